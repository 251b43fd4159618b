"""Which tools a request lets the model call, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from proxyserve.api.schemas.tools import NamedTool, ToolBody, ToolChoiceBody
from proxyserve.config import Limits
from proxyserve.errors import InvalidRequest
from proxyserve.text.tools.formats import Tool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """`shown` are in the prompt, and of them those in `callable` may be called; these say whether they are `strict`.
    `forced`: the answer is calls and nothing else; `named`: the client has said which. `several`: more than one call
    may come."""

    shown: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    forced: bool = False
    named: bool = False
    several: bool = True

    @property
    def bound(self) -> bool:
        """Whether calls that the model makes of its own accord must keep to something."""
        strict = any(tool["function"].get("strict") for tool in self.callable)
        return bool(self.callable) and (strict or len(self.callable) < len(self.shown))


def tool_use(
    tools: Sequence[ToolBody] | None, choice: ToolChoiceBody | None, several: bool | None, limits: Limits
) -> ToolUse:
    """Raises InvalidRequest where the fields do not go together, or are above `limits`."""
    shown = _rendered(tools or (), limits)
    kind = "auto" if choice is None else choice.type
    _check_parts(choice)
    if not shown:
        for name, given in (("tool_choice", choice), ("parallel_tool_calls", several)):
            if given is not None:
                raise InvalidRequest(f"'{name}' needs 'tools'.", param=name)
        return ToolUse()
    if kind == "none":
        return ToolUse()
    allowed = None if choice is None else choice.allowed_tools
    if allowed is not None:
        callable_tools = _chosen(shown, allowed.tools, "tool_choice.allowed_tools.tools")
        kind = allowed.mode
    elif choice is not None and choice.function is not None:
        named = NamedTool(type="function", function=choice.function)
        callable_tools = _chosen(shown, [named], "tool_choice.function.name")
    else:
        callable_tools = shown
    return ToolUse(
        tuple(_without_strict(tool) for tool in shown),
        callable_tools,
        forced=kind in ("required", "function"),
        named=kind == "function",
        several=several is not False and kind != "function",
    )


def _rendered(tools: Sequence[ToolBody], limits: Limits) -> tuple[Tool, ...]:
    """As chat templates want them, and with `strict`."""
    if len(tools) > limits.max_tools:
        raise InvalidRequest(
            f"{len(tools)} tools are given; this server allows {limits.max_tools}.", param="tools"
        )
    shown = tuple(tool.rendered() for tool in tools)
    names: set[str] = set()
    for number, tool in enumerate(shown):
        name = tool["function"]["name"]
        if name in names:
            raise InvalidRequest("Two tools have this name.", param=f"tools[{number}].function.name")
        names.add(name)
        if _deeper_than(tool, limits.max_tool_depth):
            raise InvalidRequest(
                f"It is nested more than {limits.max_tool_depth} deep.",
                param=f"tools[{number}].function.parameters",
            )
    size = len(to_json(shown))
    if size > limits.max_tool_bytes:
        raise InvalidRequest(
            f"The tools have {size} bytes of JSON; this server allows {limits.max_tool_bytes}.", param="tools"
        )
    return shown


def _without_strict(tool: Tool) -> Tool:
    """What the model is told; whether a tool is strict is not its business."""
    function = {name: value for name, value in tool["function"].items() if name != "strict"}
    return {**tool, "function": function}


def _check_parts(choice: ToolChoiceBody | None) -> None:
    """The object that belongs to the type must be there, and no other."""
    if choice is None:
        return
    for name in ("function", "allowed_tools"):
        given, wanted = getattr(choice, name) is not None, choice.type == name
        if given != wanted:
            raise InvalidRequest(
                f"Type '{choice.type}' {'needs' if wanted else 'has no'} '{name}'.",
                param=f"tool_choice.{name}",
            )


def _chosen(shown: Sequence[Tool], wanted: Sequence[NamedTool], param: str) -> tuple[Tool, ...]:
    by_name = {tool["function"]["name"]: tool for tool in shown}
    names = dict.fromkeys(tool.function.name for tool in wanted)
    for name in names:
        if name not in by_name:
            raise InvalidRequest(f"There is no tool '{name}' in 'tools'.", param=param)
    return tuple(by_name[name] for name in names)


def _deeper_than(value: Any, most: int) -> bool:
    """Whether objects and lists are nested more than `most` deep."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return any(isinstance(entry, dict | list) for entry in level)
