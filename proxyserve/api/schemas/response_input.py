"""The input of `/v1/responses`: a text, or the items of a conversation, those of earlier responses among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, GetJsonSchemaHandler, Tag
from pydantic_core import CoreSchema

from proxyserve.api.schemas.base import MAX_ENTRIES, AtMost, NotYet, RequestModel
from proxyserve.api.schemas.message import MAX_CALL_ID
from proxyserve.api.schemas.tools import FunctionName

#: What items of earlier responses bring along. It changes nothing.
_AsItCame = Annotated[Any, Field(description="As it came with the item; it changes nothing.")]

CallId = Annotated[str, Field(min_length=1, max_length=MAX_CALL_ID)]


class TextPart(RequestModel):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[Any, NotYet([])] = None
    logprobs: _AsItCame = None
    prompt_cache_breakpoint: Annotated[Any, NotYet()] = None


class ReasoningPart(RequestModel):
    type: Literal["reasoning_text"]
    text: str


def _as_part(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class _OrText:
    """Annotates a list: the OpenAPI document says that a string will do."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


Parts = Annotated[list[TextPart], BeforeValidator(_as_part), AtMost(MAX_ENTRIES), _OrText()]


def joined(parts: list[TextPart]) -> str:
    """As chat messages join theirs."""
    return "\n".join(part.text for part in parts)


class _Item(RequestModel):
    id: _AsItCame = None
    status: _AsItCame = None


class MessageItem(_Item):
    """One turn. `developer` is OpenAI's newer name for `system` and is rendered as that."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    phase: Annotated[Any, NotYet()] = None


class ReasoningInput(_Item):
    """What the model thought before the items that follow; the chat template decides what becomes of it."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart], AtMost(MAX_ENTRIES)] | None = None
    summary: Annotated[Any, NotYet([])] = None
    encrypted_content: Annotated[Any, NotYet()] = None


class FunctionCallInput(_Item):
    """The model called a function."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str = Field(description="A JSON object.")
    namespace: Annotated[Any, NotYet()] = None
    caller: Annotated[Any, NotYet()] = None


class FunctionCallOutput(_Item):
    """What the function answered."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Parts
    name: Annotated[Any, NotYet()] = None
    namespace: Annotated[Any, NotYet()] = None
    caller: Annotated[Any, NotYet()] = None


def _kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return f"<{kind or 'message'}>" if isinstance(kind, str | None) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[ReasoningInput, Tag("<reasoning>")]
    | Annotated[FunctionCallInput, Tag("<function_call>")]
    | Annotated[FunctionCallOutput, Tag("<function_call_output>")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message="It must be a message, or an item of type reasoning, function_call, function_call_output",
    ),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[
    list[InputItem],
    Field(min_length=1),
    BeforeValidator(_as_items),
    AtMost(MAX_ENTRIES),
    _OrText(),
]
