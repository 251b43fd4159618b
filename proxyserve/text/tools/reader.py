"""Reading tool calls from an answer as it comes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from proxyserve.text.markers import split_at_marker
from proxyserve.text.pieces import Content, Piece
from proxyserve.text.tools.call_object import CallObject, MalformedCall


@dataclass(frozen=True, slots=True)
class CallMarks:
    """What stands around calls. `close` is "" where nothing does: then further calls may follow after a separator. With
    `bare` an answer may begin with a call that `open` does not announce."""

    open: str
    close: str = ""
    separator: str = ""
    bare: bool = False


class CallReader:
    """Splits content into calls of `tools` and other text.

    What looks like a call and is none, because it is not JSON, lacks a name, or names no known tool, stays content,
    marks and all. White space around calls is dropped. `ended` counts the calls that are complete.
    """

    def __init__(self, marks: CallMarks, tools: Collection[str]) -> None:
        self.ended = 0
        self._marks = marks
        self._tools = tools
        self._held = ""  # not yet told: the beginning of a mark, white space, or a call that has not begun
        self._object: CallObject | None = None
        self._closing = False  # after a call's object
        self._bare = marks.bare  # nothing but white space since the beginning or a separator
        self._fresh = False  # nothing but white space since a call

    @property
    def calls(self) -> int:
        """Calls that have begun."""
        return self.ended + (self._object is not None and self._object.begun)

    def push(self, text: str) -> Sequence[Piece]:
        pieces: list[Piece] = []
        while text:
            if self._object is not None:
                text = self._read_call(self._object, text, pieces)
            elif self._closing:
                text = self._close(text)
            else:
                text = self._read_text(text, pieces)
        return pieces

    def finish(self) -> Sequence[Piece]:
        held, self._held = self._held, ""
        if self._closing or (self._object is not None and self._object.begun):
            return []
        if self._fresh and held.isspace():
            return []
        return [Content(held)] if held else []

    def _read_text(self, text: str, pieces: list[Piece]) -> str:
        """Look for the beginning of a call. Returns what follows it."""
        text = self._held + text
        self._held = ""
        if self._bare:
            bare = text.lstrip()
            if bare.startswith("{"):
                self._begin(text[: len(text) - len(bare)])
                return bare
            if not bare or self._marks.open.startswith(bare):
                self._held = text
                return ""
            self._bare = bare.startswith(self._marks.open)
        before, mark, after = split_at_marker(text, [self._marks.open])
        said = before.rstrip()
        if said:
            pieces.append(Content(said))
            self._fresh = False
        space = before[len(said) :]
        if mark is None:
            self._held = space + after
            return ""
        self._begin(space + mark)
        return after

    def _begin(self, mark: str) -> None:
        """A call may come; `mark`, white space included, announced it."""
        self._bare = False
        self._object = CallObject(self.ended, self._tools)
        self._held = mark

    def _read_call(self, call: CallObject, text: str, pieces: list[Piece]) -> str:
        """Returns what follows the call's object, or what is to be read again."""
        for position, character in enumerate(text):
            try:
                belongs = call.push(character)
            except MalformedCall:
                return self._give_up(text[position:], pieces)
            if not call.begun:
                self._held += character
            if call.pieces:
                pieces.extend(call.pieces)
                call.pieces.clear()
            if call.complete:
                self._object, self._held, self._closing = None, "", True
                self.ended += 1
                return text[position + belongs :]
        return ""

    def _give_up(self, rest: str, pieces: list[Piece]) -> str:
        """It was no call. What announced it is content; what follows is read again."""
        text, self._held, self._object = self._held + rest, "", None
        start = len(text) - len(text.lstrip())
        mark = self._marks.open if text.startswith(self._marks.open, start) else text[start]
        end = start + len(mark)
        pieces.append(Content(text[:end]))
        self._fresh = False
        return text[end:]

    def _close(self, text: str) -> str:
        """Take what belongs to the end of a call. Returns what follows it."""
        text = self._held + text
        self._held = ""
        mark = self._marks.close or self._marks.separator
        bare = text.lstrip()
        if mark.startswith(bare) and len(bare) < len(mark):
            self._held = text
            return ""
        self._closing, self._fresh = False, True
        self._bare = self._marks.bare
        return bare[len(mark) :] if bare.startswith(mark) else text
