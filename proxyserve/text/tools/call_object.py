"""Reading one call, `{"name": ..., "arguments": {...}}`, character by character."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator

from proxyserve.text.pieces import CallArguments, CallBegun, Piece

#: The names under which models write a call's arguments.
_ARGUMENTS = ("arguments", "parameters")

#: What may stand beside name and arguments; it says nothing more.
_BESIDE = ("type", "id")

_SPACE = " \t\r\n"

#: A coroutine that is sent one character at a time and returns a value.
Steps = Generator[None, str, str]


class MalformedCall(ValueError):
    """The text is no call of a known tool."""


class CallObject:
    """One JSON object as it comes. `pieces` are what is known of the call. It has `begun` once its name is read and its
    arguments have begun; whatever comes after that, a call it is. `complete` after the closing brace, or where the
    object of a call that has begun goes wrong.

    Arguments are passed on as they were written. Ones that were written as a JSON string are the string; missing ones
    and null are `{}`.
    """

    def __init__(self, index: int, tools: Collection[str]) -> None:
        self.pieces: list[Piece] = []
        self.complete = False
        self.begun = False
        self._index = index
        self._tools = tools
        self._steps = self._read()
        next(self._steps)

    def push(self, character: str) -> bool:
        """Whether the character belongs to the call. Raises MalformedCall if there is none."""
        try:
            self._steps.send(character)
        except StopIteration:
            self.complete = True
        except MalformedCall:
            if not self.begun:
                raise
            self.complete = True
            return False
        return True

    def _read(self) -> Generator[None, str, None]:
        name: str | None = None
        arguments: str | None = None  # read before the name was
        if (yield from self._next()) != "{":
            raise MalformedCall
        while True:
            key, _ = yield from self._string_of((yield from self._next()))
            if (yield from self._next()) != ":":
                raise MalformedCall
            first = yield from self._next()
            if key == "name" and name is None:
                name, _ = yield from self._string_of(first)
                if name not in self._tools:
                    raise MalformedCall
                if arguments is not None:
                    self._begin(name)
                    self._say(arguments)
                after = yield from self._next()
            elif key in _ARGUMENTS and arguments is None:
                told = first == "{" and name is not None
                if told:
                    assert name is not None
                    self._begin(name)
                    arguments = ""
                raw, after = yield from self._value_of(first, say=told)
                if not told:
                    arguments = _arguments(raw)
                    if name is not None:
                        self._begin(name)
                        self._say(arguments)
            elif key in _BESIDE or self.begun:
                _, after = yield from self._value_of(first)
            else:
                raise MalformedCall
            if after in _SPACE:
                after = yield from self._next()
            if after == "}":
                break
            if after != ",":
                raise MalformedCall
        if name is None:
            raise MalformedCall
        if not self.begun:
            self._begin(name)
            self._say("{}")

    def _begin(self, name: str) -> None:
        self.begun = True
        self.pieces.append(CallBegun(self._index, name))

    def _say(self, text: str) -> None:
        self.pieces.append(CallArguments(self._index, text))

    def _next(self) -> Steps:
        """The next character that is no space."""
        while True:
            character = yield
            if character not in _SPACE:
                return character

    def _string_of(self, first: str) -> Generator[None, str, tuple[str, str]]:
        """A JSON string that begins with `first`, and its JSON text."""
        if first != '"':
            raise MalformedCall
        raw = yield from self._rest_of_string()
        try:
            text = json.loads('"' + raw, strict=False)
        except ValueError as error:
            raise MalformedCall from error
        return str(text), '"' + raw

    def _rest_of_string(self, *, say: bool = False) -> Steps:
        """Up to and with the closing quote."""
        raw = ""
        while True:
            character = yield
            raw += character
            if say:
                self._say(character)
            if character == '"':
                return raw
            if character == "\\":
                escaped = yield
                raw += escaped
                if say:
                    self._say(escaped)

    def _value_of(self, first: str, *, say: bool = False) -> Generator[None, str, tuple[str, str]]:
        """Any JSON value that begins with `first`, as it is written, and the character after it. With `say` its
        characters are pieces at once."""
        if first == '"':
            _, raw = yield from self._string_of(first)
            return raw, (yield from self._next())
        if first not in "{[":
            raw, after = first, ""
            while (after := (yield)) not in ",}" + _SPACE:
                raw += after
            return raw, after
        raw, depth = "", 0
        character = first
        while True:
            raw += character
            if say:
                self._say(character)
            if character == '"':
                raw += yield from self._rest_of_string(say=say)
            elif character in "{[":
                depth += 1
            elif character in "}]":
                depth -= 1
            if depth == 0:
                return raw, (yield from self._next())
            character = yield


def _arguments(raw: str) -> str:
    """The arguments that a value which is no object that could be passed on at once stands for."""
    try:
        value = json.loads(raw, strict=False)
    except ValueError as error:
        raise MalformedCall from error
    if value is None:
        return "{}"
    if isinstance(value, dict):
        return raw
    if isinstance(value, str) and _is_text(value):
        return value
    raise MalformedCall


def _is_text(value: str) -> bool:
    """Whether it can be sent: JSON can spell half a surrogate pair, UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
