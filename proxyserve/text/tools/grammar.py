"""Grammars of answers with tool calls, in the Lark dialect of llguidance.

They describe the form that the parser of the same name reads, with each tool's JSON schema for its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from proxyserve.text.tools.formats import Tool, ToolFormat

#: Arguments are spaced as Python's `json.dumps` does it, which is what models are trained on.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def forced_calls(form: ToolFormat, tools: Sequence[Tool], *, several: bool, special: Collection[str]) -> str:
    """An answer that is a call of one of `tools`, or several, and nothing else. `special` are the texts of the
    tokenizer's special tokens, which grammars write in a way of their own."""
    return "\n".join(["start: calls", *_calls(form, several, special), *_objects(form, tools, loose=False)])


def free_calls(form: ToolFormat, tools: Sequence[Tool], *, special: Collection[str]) -> str:
    """Any text, but what begins as a call must be one of `tools`; arguments follow the schemas of tools that are
    `strict`."""
    mark, objects = form.marks.open, _objects(form, tools, loose=True)
    if form.marks.bare:
        first = r"[^{\s]" if mark in special else r"[^{\s" + mark[0] + "]"
        rules = ["start: calls | OTHER", f"OTHER: /({first}(.|\\n)*)?/", *_calls(form, True, special)]
    else:
        rules = [
            f'start: (begun "\\n" object {_close(form, special)})* rest',
            f"begun: TEXT {mark}" if mark in special else f"begun[lazy]: TEXT {json.dumps(mark)}",
            "rest: TEXT",
            r"TEXT: /(.|\n)*/",
        ]
    return "\n".join([*rules, *objects])


def _calls(form: ToolFormat, several: bool, special: Collection[str]) -> list[str]:
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
        head = f'{{"name": {json.dumps(function["name"])}, "{form.arguments}": '
        schema = json.dumps(_schema(function, loose=loose))
        rules.append(f'object_{number}: {json.dumps(head)} %json {schema} "}}"')
    return rules


def _schema(function: Any, *, loose: bool) -> dict[str, Any]:
    """Of the arguments. Where a tool is not strict, what the library does not know of a schema is not enforced, and
    `loose` asks for an object only."""
    strict = function.get("strict") is True
    parameters = function.get("parameters")
    if loose and not strict:
        parameters = {"type": "object"}
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    return {**parameters, "x-guidance": {**_SPACING, "lenient": not strict}}


def _close(form: ToolFormat, special: Collection[str]) -> str:
    return f'"\\n" {_mark(form.marks.close, special)}'


def _mark(mark: str, special: Collection[str]) -> str:
    """A special token's text stands without quotes."""
    return mark if mark in special else json.dumps(mark)
