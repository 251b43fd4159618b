"""The parts of responses that both generating routes share. A field that is not set is left out of the JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from proxyserve.types import FinishReason

FinishReasonName = Literal["stop", "length", "tool_calls"]


class PromptLogprob(BaseModel):
    """One token at one position of a prompt, as vLLM writes it. `rank` is 1 for the most likely token, and null for one
    that the law rules out. -9999.0 stands for minus infinity."""

    logprob: float
    rank: int | None
    decoded_token: str


#: Per position of the base's prompt, by token id: the token that stands there, and the most likely ones. Null where
#: nothing comes before.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


class PromptExtras(BaseModel):
    """What is said of a prompt beyond OpenAI's fields; only what was asked for is there."""

    prompt_token_ids: list[int] | None = Field(
        None, description="With `return_token_ids`: the base's prompt."
    )
    prompt_logprobs: PromptLogprobs | None = Field(None, description="With `prompt_logprobs`.")


class ChoiceExtras(BaseModel):
    """Choices of both generating routes: their number, and what they have beyond OpenAI's fields, of which only what
    was asked for is there."""

    index: int
    stop_reason: str | int | None = Field(
        None,
        description="The stop string or id of `stop_token_ids` that ended the answer, null for any other end.",
    )
    token_ids: list[int] | None = Field(None, description="With `return_token_ids`: all generated tokens.")
    listed_logprobs: list[dict[int, float] | None] | None = Field(
        None,
        description="With `logprob_token_ids`: an entry per generated token, and with `echo` per prompt token.",
    )


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens of the base that came from its prefix cache.")


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = Field(description="Generated tokens of reasoning, its marks included.")


class UsageBody(BaseModel):
    """`lane_tokens` counts, per model, the tokens that ran through it; cached prompt tokens did not run. With a gate,
    `gated_tokens` counts the tokens that the base alone decided, and `skipped_lane_tokens`, per model, those that its
    lanes never ran."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None
    lane_tokens: dict[str, int]
    gated_tokens: int | None = None
    skipped_lane_tokens: dict[str, int] | None = None


def finish_name(reason: FinishReason | None) -> Any:
    """The reason in OpenAI's words; only choices that were finished have one."""
    return None if reason is None else reason.value
