"""The ways in which models write tool calls: Hermes (also Qwen's) and Llama 3.

A format says how calls are read from an answer, how a template that knows no tools tells the model of them, and, as a
grammar, what an answer that must call looks like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from proxyserve.text.tools.reader import CallMarks, CallReader

#: How `--tool-parser` names the formats.
ToolFormatName = Literal["hermes", "llama"]

#: A tool as the HTTP API and chat templates have it: `{"type": "function", "function": {...}}`.
Tool = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """`arguments` is the name of the arguments in a call's object, `announcement` how a model is told of the tools that
    follow it as JSON, a line each, `manner` how it is told to call them."""

    name: ToolFormatName
    marks: CallMarks
    arguments: str
    announcement: str
    manner: str

    def reader(self, tools: Sequence[Tool]) -> CallReader:
        """A reader of one answer of a model that has these tools."""
        return CallReader(self.marks, tool_names(tools))

    def instruction(self, tools: Sequence[Tool]) -> str:
        """A system message that does what a template without tools does not do."""
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        return f"{self.announcement}\n{listed}\n{self.manner}"

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls of an earlier turn, in the form of chat templates (`arguments` is an object), as the model would have
        written them."""
        objects = [
            json.dumps(
                {"name": call["function"]["name"], self.arguments: call["function"]["arguments"]},
                ensure_ascii=False,
            )
            for call in calls
        ]
        if self.marks.close:
            return "\n".join(f"{self.marks.open}\n{text}\n{self.marks.close}" for text in objects)
        return f"{self.marks.separator} ".join(objects)


HERMES = ToolFormat(
    "hermes",
    CallMarks("<tool_call>", "</tool_call>"),
    "arguments",
    announcement="You may call functions to help with the request. The functions, as JSON:\n<tools>",
    manner="</tools>\n\n"
    "To call one, write a JSON object with its name and arguments between tags, one pair of tags for each call:\n"
    '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>',
)

LLAMA = ToolFormat(
    "llama",
    CallMarks("<|python_tag|>", separator=";", bare=True),
    "parameters",
    announcement="You may call functions to help with the request. The functions, as JSON:\n",
    manner="\nTo call one, answer with a JSON object and nothing else, and put ; between several:\n"
    '{"name": <name>, "parameters": <object>}',
)

FORMATS: Mapping[ToolFormatName, ToolFormat] = {"hermes": HERMES, "llama": LLAMA}

#: How Llama templates show the form of a call.
_LLAMA_FORM = re.compile(r'\\?"name\\?".{1,60}\\?"parameters\\?"', re.DOTALL)


def format_of_template(template: str) -> ToolFormat | None:
    """The format that a chat template (its source) teaches; None if it is neither of these."""
    if HERMES.marks.open in template:
        return HERMES
    if LLAMA.marks.open in template or _LLAMA_FORM.search(template):
        return LLAMA
    return None


def tool_names(tools: Sequence[Tool]) -> Collection[str]:
    return {str(tool["function"]["name"]) for tool in tools}


def without_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] | None, form: ToolFormat
) -> list[dict[str, Any]]:
    """A conversation with tools for a template that knows none: the tools are announced in the system message, calls
    are text, and results come from the user."""
    plain: list[dict[str, Any]] = []
    previous = ""
    for message in messages:
        calls = message.get("tool_calls")
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if previous == "tool":  # templates may want user and assistant in turn
                plain[-1]["content"] += f"\n{result}"
            else:
                plain.append({"role": "user", "content": result})
        elif calls:
            said = message.get("content")
            text = form.written(calls)
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            plain.append({**rest, "content": f"{said}\n{text}" if said else text})
        else:
            plain.append(dict(message))
        previous = message["role"]
    if tools:
        instruction = form.instruction(tools)
        if plain and plain[0]["role"] == "system":
            plain[0]["content"] += f"\n\n{instruction}"
        else:
            plain.insert(0, {"role": "system", "content": instruction})
    return plain
