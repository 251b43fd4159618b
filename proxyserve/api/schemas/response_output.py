"""What `/v1/responses` answers: the items of an output, and the response around them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from proxyserve.api.schemas.chat import ChatTokenLogprob
from proxyserve.api.schemas.explain import ExplainedToken
from proxyserve.api.schemas.fusion import FusionSummary
from proxyserve.api.schemas.structured import GrammarReport

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field(description="Always empty: nothing here cites.")
    logprobs: list[ChatTokenLogprob] = Field(
        description="With `include`: an entry per token of the message, of the fused law before bias, penalties, "
        "temperature and truncation."
    )


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(BaseModel):
    """Text for the reader."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class ReasoningItem(BaseModel):
    """What the model wrote for itself. It comes in full, so there is never a summary."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]


class FunctionCall(BaseModel):
    """`arguments` is JSON as the model wrote it; only `strict` tools promise that it fits their schema."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = Annotated[OutputMessage | ReasoningItem | FunctionCall, Field(discriminator="type")]
ContentPart = Annotated[OutputText | ReasoningText, Field(discriminator="type")]


class InputTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens of the base that came from its prefix cache.")
    cache_write_tokens: int = Field(description="Always 0: writing to the cache is not counted.")


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = Field(description="Tokens that were generated before the reasoning ended.")


class ResponseUsage(BaseModel):
    """OpenAI's names for what the other routes count; `lane_tokens` and what follows are the same as there."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    lane_tokens: dict[str, int]
    gated_tokens: int | None = None
    skipped_lane_tokens: dict[str, int] | None = None


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponseFailure(BaseModel):
    code: Literal["server_error"]
    message: str


class ResponseObject(BaseModel):
    """Fields of the request come back as they were understood. Nothing is stored: the id can be used for nothing."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: ResponseStatus
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None = Field(description="Null until the response is complete.")

    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None

    stop_reason: str | int | None = Field(
        None,
        description="At the end: the stop string or id of `stop_token_ids` that ended it, null for any other end.",
    )
    grammar: GrammarReport | None = Field(None, description="With a required form: what it changed.")
    fusion: FusionSummary | None = Field(
        None, description="Left out for requests to a plain base of this server, and until the end."
    )
    explain: list[ExplainedToken] | None = Field(
        None, description="With `fusion.explain`, at the end: an entry per generated token."
    )
