"""Bodies of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from proxyserve.api.schemas.base import NotYet
from proxyserve.api.schemas.common import Count, GenerationRequest
from proxyserve.api.schemas.explain import ExplainedToken
from proxyserve.api.schemas.fusion import FusionSummary
from proxyserve.api.schemas.message import Message
from proxyserve.api.schemas.responses import FinishReasonName, UsageBody


class ChatRequest(GenerationRequest):
    """`max_tokens` (or its newer name `max_completion_tokens`) defaults to what is left of the context."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None, description="How many of the most likely tokens to give at each position; needs `logprobs`."
    )

    audio: Annotated[Any, NotYet()] = None
    function_call: Annotated[Any, NotYet("none")] = None
    functions: Annotated[Any, NotYet([])] = None
    modalities: Annotated[Any, NotYet(["text"])] = None
    parallel_tool_calls: Annotated[Any, NotYet(True, False)] = None
    prediction: Annotated[Any, NotYet()] = None
    reasoning_effort: Annotated[Any, NotYet("none")] = None
    response_format: Annotated[Any, NotYet({"type": "text"})] = None
    store: Annotated[Any, NotYet(False)] = None
    tool_choice: Annotated[Any, NotYet("none")] = None
    tools: Annotated[Any, NotYet([])] = None
    verbosity: Annotated[Any, NotYet("medium")] = None
    web_search_options: Annotated[Any, NotYet()] = None


class TopLogprob(BaseModel):
    """`logprob` is -9999.0 for a token of probability 0, since JSON has no infinities."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of the fused law before bias, penalties, temperature and truncation."""

    content: list[ChatTokenLogprob]
    refusal: None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName
    explain: list[ExplainedToken] | None = Field(
        None, description="With `fusion.explain`: an entry per token."
    )


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody
    fusion: FusionSummary | None = Field(
        None, description="Left out for requests to a plain base of this server."
    )


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName | None
    explain: list[ExplainedToken] | None = Field(
        None, description="With `fusion.explain`: an entry per token."
    )


class ChatChunk(BaseModel):
    """One server-sent event. With `include_usage`, `usage` is null on all but the last, which has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None
    fusion: FusionSummary | None = Field(None, description="On the last chunk of fused requests.")
