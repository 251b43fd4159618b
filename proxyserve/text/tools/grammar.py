"""Grammars of answers with tool calls, in the Lark dialect of llguidance.

They describe the form that the parser of the same name reads, with each tool's JSON schema for its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from proxyserve.text.tools.formats import Tool, ToolFormat

#: Arguments are spaced as Python's `json.dumps` does it, which is what models are trained on.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def forced_calls(
    form: ToolFormat,
    tools: Sequence[Tool],
    *,
    several: bool,
    special: Mapping[str, int],
    otherwise: Mapping[str, Any] | None = None,
) -> str:
    """An answer that is a call of one of `tools`, or several, and nothing else; or JSON of the schema `otherwise`.
    `special` has the tokenizer's special tokens by their texts: they are no text to a grammar, it names their ids."""
    rules = [*_calls(form, several, special), *_objects(form, tools, loose=False)]
    if otherwise is None:
        return "\n".join(["start: calls", *rules])
    return "\n".join(["start: calls | answer", f"answer: %json {_spaced(otherwise, lenient=False)}", *rules])


def free_calls(form: ToolFormat, tools: Sequence[Tool], *, special: Mapping[str, int]) -> str:
    """Any text, but what begins as a call must be one of `tools`; arguments follow the schemas of tools that are
    `strict`."""
    mark, objects = form.marks.open, _objects(form, tools, loose=True)
    if form.marks.bare:
        first = r"[^{\s]" if mark in special else r"[^{\s" + mark[0] + "]"
        rules = ["start: calls | OTHER", f"OTHER: /({first}(.|\\n)*)?/", *_calls(form, True, special)]
    else:
        rules = [
            f'start: (begun "\\n" object {_close(form, special)})* rest',
            f"begun: TEXT {_mark(mark, special)}"
            if mark in special
            else f"begun[lazy]: TEXT {json.dumps(mark)}",
            "rest: TEXT",
            r"TEXT: /(.|\n)*/",
        ]
    return "\n".join([*rules, *objects])


def _calls(form: ToolFormat, several: bool, special: Mapping[str, int]) -> list[str]:
    """The rule of what stands around the objects of calls."""
    mark = _mark(form.marks.open, special)
    if form.marks.bare:
        more = f' ("{form.marks.separator} " object)*' if several else ""
        return [f"calls: {mark}? object{more}"]
    return [
        'calls: call ("\\n" call)*' if several else "calls: call",
        f'call: {mark} "\\n" object {_close(form, special)}',
    ]


def _objects(form: ToolFormat, tools: Sequence[Tool], *, loose: bool) -> list[str]:
    """The rules of a call's object. The schemas stand alone, so that their references stay true."""
    rules = [f"object: {' | '.join(f'object_{number}' for number in range(len(tools)))}"]
    for number, tool in enumerate(tools):
        function = tool["function"]
        # Cut as the library cuts JSON, so that an answer in JSON can begin as a call does.
        parts = ["{", '"name"', ": ", json.dumps(function["name"]), ", ", f'"{form.arguments}"', ": "]
        head = " ".join(json.dumps(part) for part in parts)
        rules.append(f'object_{number}: {head} %json {_arguments(function, loose=loose)} "}}"')
    return rules


def _arguments(function: Mapping[str, Any], *, loose: bool) -> str:
    """The schema of the arguments. Where a tool is not strict, what the library does not know of it is not enforced,
    and `loose` asks for an object only."""
    strict = function.get("strict") is True
    parameters = function.get("parameters")
    if loose and not strict:
        parameters = {"type": "object"}
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    return _spaced(parameters, lenient=not strict)


def _spaced(schema: Mapping[str, Any], *, lenient: bool) -> str:
    return json.dumps({**schema, "x-guidance": {**_SPACING, "lenient": lenient}})


def _close(form: ToolFormat, special: Mapping[str, int]) -> str:
    return f'"\\n" {_mark(form.marks.close, special)}'


def _mark(mark: str, special: Mapping[str, int]) -> str:
    return f"<[{special[mark]}]>" if mark in special else json.dumps(mark)
