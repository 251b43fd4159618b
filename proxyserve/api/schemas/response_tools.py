"""Tools and the form of the text as `/v1/responses` writes them: flatter than `/v1/chat/completions`, in whose form the
rest of the server has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from proxyserve.api.schemas.base import MAX_ENTRIES, AtMost, NotYet, RequestModel
from proxyserve.api.schemas.structured import JsonObjectFormat, NamedSchema, TextFormat
from proxyserve.api.schemas.tools import (
    AllowedTools,
    FunctionBody,
    FunctionName,
    FunctionReference,
    NamedTool,
    ToolBody,
    ToolChoiceBody,
)


def _only_functions(value: Any) -> Any:
    if isinstance(value, str) and value != "function":
        raise PydanticCustomError(
            "tool_type", "Only functions, which the client runs, are supported; this server runs no tools"
        )
    return value


class FunctionTool(RequestModel):
    """`parameters` is a JSON Schema; without it the function takes no arguments. With `strict` the arguments of calls
    are sure to follow it; null is false."""

    type: Annotated[Literal["function"], BeforeValidator(_only_functions)]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    allowed_callers: Annotated[Any, NotYet(["direct"])] = None
    defer_loading: Annotated[Any, NotYet(False)] = None
    output_schema: Annotated[Any, NotYet()] = None

    def for_chat(self) -> ToolBody:
        function = FunctionBody(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )
        return ToolBody(type="function", function=function)


class NamedFunction(RequestModel):
    type: Literal["function"]
    name: FunctionName

    def for_chat(self) -> NamedTool:
        return NamedTool(type="function", function=FunctionReference(name=self.name))


class AllowedFunctions(RequestModel):
    """All tools are shown to the model, and these alone may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1), AtMost(MAX_ENTRIES)]

    def for_chat(self) -> AllowedTools:
        return AllowedTools(mode=self.mode, tools=[tool.for_chat() for tool in self.tools])


def _kind(value: Any) -> str | None:
    """The tag of what was given: in angle brackets, so that paths of fields leave it out."""
    if isinstance(value, str):
        return "<word>"
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return f"<{kind}>" if isinstance(kind, str) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedFunction, Tag("<function>")]
    | Annotated[AllowedFunctions, Tag("<allowed_tools>")],
    Discriminator(
        _kind,
        custom_error_type="tool_choice",
        custom_error_message="It must be 'none', 'auto', 'required', a function or allowed_tools",
    ),
]


def choice_for_chat(choice: ToolChoice | None) -> ToolChoiceBody | None:
    match choice:
        case None:
            return None
        case NamedFunction():
            return ToolChoiceBody(type="function", function=choice.for_chat().function)
        case AllowedFunctions():
            return ToolChoiceBody(type="allowed_tools", allowed_tools=choice.for_chat())
        case word:
            return ToolChoiceBody(type=word)


class JsonSchemaText(NamedSchema):
    type: Literal["json_schema"]


TextForm = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaText, Tag("<json_schema>")],
    Discriminator(
        _kind,
        custom_error_type="text_format",
        custom_error_message="Its type must be text, json_object or json_schema",
    ),
]


class TextConfig(RequestModel):
    """The form that the text must have."""

    format: TextForm | None = None
    verbosity: Annotated[Any, NotYet("medium")] = None
