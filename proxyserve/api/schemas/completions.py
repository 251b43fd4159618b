"""Bodies of `/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from proxyserve.api.schemas.base import NotYet
from proxyserve.api.schemas.common import MAX_COUNT, GenerationRequest
from proxyserve.api.schemas.explain import ExplainedToken
from proxyserve.api.schemas.fusion import FusionSummary
from proxyserve.api.schemas.responses import FinishReasonName, UsageBody

#: What OpenAI gives a completion that names no `max_tokens`.
DEFAULT_MAX_TOKENS = 16

Prompt = str | tuple[int, ...]


def _parse_prompts(value: Any) -> tuple[Prompt, ...]:
    """One prompt or many, as text or as token ids, always as many."""
    if isinstance(value, str):
        return (_require_text(value),)
    if isinstance(value, list) and value:
        if all(isinstance(entry, str) for entry in value):
            return tuple(_require_text(entry) for entry in value)
        if all(isinstance(entry, list) for entry in value):
            return tuple(_require_ids(entry) for entry in value)
        if not any(isinstance(entry, str | list) for entry in value):
            return (_require_ids(value),)
    if value == []:
        raise PydanticCustomError("empty", "A prompt must not be empty")
    raise PydanticCustomError(
        "prompt_type",
        "It must be a string, a list of strings, a list of token ids, or a list of lists of token ids",
    )


def _require_text(text: str) -> str:
    if not text:
        raise PydanticCustomError("empty", "A prompt must not be empty")
    return text


def _require_ids(ids: list[Any]) -> tuple[int, ...]:
    if not ids:
        raise PydanticCustomError("empty", "A prompt must not be empty")
    if not all(type(token) is int and 0 <= token <= MAX_COUNT for token in ids):
        raise PydanticCustomError("token_id", "Token ids must be whole numbers, 0 or more")
    return tuple(ids)


_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_COUNT}}
_TEXT = {"type": "string", "minLength": 1}

Prompts = Annotated[
    tuple[Prompt, ...],
    PlainValidator(_parse_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "minItems": 1, "items": _TEXT},
                _IDS,
                {"type": "array", "minItems": 1, "items": _IDS},
            ],
            "examples": ["Once upon a time"],
        }
    ),
]


class CompletionRequest(GenerationRequest):
    """With several prompts, choice `prompt * n + i` is the i-th answer to a prompt. `max_tokens` defaults to 16."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="How many of the most likely tokens to give at each position, beside the chosen one.",
    )
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Name tokens in `logprobs` by id, `token_id:123`, so that no two have one name."
    )

    best_of: Annotated[Any, NotYet(1)] = None
    echo: Annotated[Any, NotYet(False)] = None
    suffix: Annotated[Any, NotYet("")] = None


class CompletionLogprobs(BaseModel):
    """Of the fused law before bias, penalties, temperature and truncation. -9999.0 stands for minus infinity.
    `text_offset` counts characters from the beginning of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName | None
    explain: list[ExplainedToken] | None = Field(
        None, description="With `fusion.explain`: an entry per token."
    )


class Completion(BaseModel):
    """The whole response, and also each server-sent event of a stream; there `finish_reason` is null until the last
    event of a choice, and `usage` is as for chat."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None
    fusion: FusionSummary | None = Field(
        None, description="Left out for requests to a plain base of this server."
    )
