"""The parts of responses that both generating routes share. A field that is not set is left out of the JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from proxyserve.types import FinishReason

FinishReasonName = Literal["stop", "length", "tool_calls"]


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
