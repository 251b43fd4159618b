"""Bodies of `/v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from proxyserve.api.schemas.base import MAX_ENTRIES, MAX_PROMPT_IDS, NotYet
from proxyserve.api.schemas.common import MAX_COUNT, Count, GenerationRequest
from proxyserve.api.schemas.explain import ExplainedToken
from proxyserve.api.schemas.fusion import FusionSummary
from proxyserve.api.schemas.responses import ChoiceExtras, FinishReasonName, PromptExtras, UsageBody
from proxyserve.api.schemas.structured import GrammarReport

#: What OpenAI gives a completion that names no `max_tokens`.
DEFAULT_MAX_TOKENS = 16

Prompt = str | tuple[int, ...]


def parse_prompt(value: Any) -> Prompt:
    """One prompt, as text or as token ids."""
    if isinstance(value, str):
        return _require_text(value)
    if isinstance(value, list):
        return _require_ids(value)
    raise PydanticCustomError("prompt_type", "It must be a string or a list of token ids")


def _parse_prompts(value: Any) -> tuple[Prompt, ...]:
    """One prompt or many, as text or as token ids, always as many."""
    if isinstance(value, str):
        return (_require_text(value),)
    if isinstance(value, list) and value:
        # A list of token ids is longer than one of prompts may be.
        if len(value) > MAX_ENTRIES and isinstance(value[0], str | list):
            raise PydanticCustomError(
                "too_many",
                "It has {count} prompts; {most} are the most",
                {"count": len(value), "most": MAX_ENTRIES},
            )
        if all(isinstance(entry, str) for entry in value):
            return tuple(_require_text(entry) for entry in value)
        if all(isinstance(entry, list) for entry in value):
            return tuple(_require_ids(entry) for entry in value)
        if not any(isinstance(entry, str | list) for entry in value):
            return (_require_ids(value),)
    if value == []:
        raise PydanticCustomError("empty", "It must not be empty")
    raise PydanticCustomError(
        "prompt_type",
        "It must be a string, a list of strings, a list of token ids, or a list of lists of token ids",
    )


def _require_text(text: str) -> str:
    if not text:
        raise PydanticCustomError("empty", "It must not be empty")
    return text


def _require_ids(ids: list[Any]) -> tuple[int, ...]:
    if not ids:
        raise PydanticCustomError("empty", "It must not be empty")
    if len(ids) > MAX_PROMPT_IDS:
        raise PydanticCustomError(
            "too_many",
            "It has {count} token ids; {most} are the most",
            {"count": len(ids), "most": MAX_PROMPT_IDS},
        )
    if not all(type(token) is int and 0 <= token <= MAX_COUNT for token in ids):
        raise PydanticCustomError("token_id", "Token ids must be whole numbers, 0 or more")
    return tuple(ids)


_IDS = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_PROMPT_IDS,
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_COUNT},
}
_TEXT = {"type": "string", "minLength": 1}

#: What `parse_prompt` takes.
PROMPT_SCHEMA = {"anyOf": [_TEXT, _IDS]}

Prompts = Annotated[
    tuple[Prompt, ...],
    PlainValidator(_parse_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "minItems": 1, "maxItems": MAX_ENTRIES, "items": _TEXT},
                _IDS,
                {"type": "array", "minItems": 1, "maxItems": MAX_ENTRIES, "items": _IDS},
            ],
            "examples": ["Once upon a time"],
        }
    ),
]


class CompletionRequest(GenerationRequest):
    """With several prompts, choice `prompt * n + i` is the i-th answer to a prompt. `max_tokens` defaults to 16."""

    prompt: Prompts = Field(
        description="A text, a list of token ids, a list of texts, or a list of lists of token ids."
    )
    echo: bool | None = Field(
        None,
        description="Begin each choice with its prompt, in its text and in its log-probabilities. Default false.",
    )
    logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="How many of the most likely tokens to give at each position, beside the chosen one.",
    )
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Name tokens in `logprobs` by id, `token_id:123`, so that no two have one name."
    )
    best_of: Count | None = Field(
        None, description="Only the value of `n` is accepted: all answers are returned."
    )

    suffix: Annotated[Any, NotYet("")] = None


class CompletionLogprobs(BaseModel):
    """Of the fused law before bias, penalties, temperature and truncation. -9999.0 stands for minus infinity. With
    `echo` the prompt's tokens come first; the first of them, which nothing comes before, has null. `text_offset`
    counts characters from the beginning of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(PromptExtras, ChoiceExtras):
    """In a stream, what belongs to the prompt comes with the choice's first chunk."""

    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName | None
    explain: list[ExplainedToken] | None = Field(
        None, description="With `fusion.explain`: an entry per generated token."
    )
    prompt_explain: list[ExplainedToken | None] | None = Field(
        None,
        description="With `fusion.explain`, where the prompt's log-probabilities are found: an entry per prompt token.",
    )
    grammar: GrammarReport | None = Field(
        None, description="With a required form: what it changed. In a stream on the choice's last event."
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
