"""Tools that a request offers to the model, and what it says about calling them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from proxyserve.api.schemas.base import MAX_ENTRIES, AtMost, RequestModel

FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class FunctionBody(RequestModel):
    """`parameters` is a JSON Schema; without it the function takes no arguments. With `strict` the arguments of calls
    are sure to follow it."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(RequestModel):
    type: Literal["function"]
    function: FunctionBody

    def rendered(self) -> dict[str, Any]:
        """As chat templates want it, and with `strict`."""
        body = self.function
        given = {"description": body.description, "parameters": body.parameters, "strict": body.strict}
        function = {"name": body.name, **{name: value for name, value in given.items() if value is not None}}
        return {"type": "function", "function": function}


class FunctionReference(RequestModel):
    name: FunctionName


class NamedTool(RequestModel):
    """Also an entry of `allowed_tools`."""

    type: Literal["function"]
    function: FunctionReference


class AllowedTools(RequestModel):
    """All tools are shown to the model, and these alone may be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1), AtMost(MAX_ENTRIES)]


class ToolChoiceBody(RequestModel):
    """As an object; `none`, `auto` and `required` are strings in JSON."""

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    function: FunctionReference | None = None
    allowed_tools: AllowedTools | None = None


def _word_or_object(value: Any) -> Any:
    if isinstance(value, str):
        if value not in _WORDS:
            raise PydanticCustomError("tool_choice", "It must be 'none', 'auto', 'required' or an object")
        return {"type": value}
    if isinstance(value, dict) and value.get("type") in _WORDS:
        raise PydanticCustomError("tool_choice", "'none', 'auto' and 'required' are written as strings")
    return value


_WORDS = ("none", "auto", "required")

_NAMED_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 64, "pattern": "^[A-Za-z0-9_-]+$"}
            },
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}

ToolChoice = Annotated[
    ToolChoiceBody,
    BeforeValidator(_word_or_object),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(_WORDS)},
                _NAMED_TOOL,
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "allowed_tools"},
                        "allowed_tools": {
                            "type": "object",
                            "properties": {
                                "mode": {"enum": ["auto", "required"]},
                                "tools": {
                                    "type": "array",
                                    "items": _NAMED_TOOL,
                                    "minItems": 1,
                                    "maxItems": MAX_ENTRIES,
                                },
                            },
                            "required": ["mode", "tools"],
                            "additionalProperties": False,
                        },
                    },
                    "required": ["type", "allowed_tools"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
