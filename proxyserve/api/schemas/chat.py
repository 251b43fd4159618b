"""Bodies of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from proxyserve.api.schemas.base import MAX_ENTRIES, AtMost, NotYet
from proxyserve.api.schemas.common import MAX_COUNT, Count, GenerationRequest
from proxyserve.api.schemas.explain import ExplainedToken
from proxyserve.api.schemas.fusion import FusionSummary
from proxyserve.api.schemas.message import Messages
from proxyserve.api.schemas.responses import ChoiceExtras, FinishReasonName, PromptExtras, UsageBody
from proxyserve.api.schemas.structured import GrammarReport, ResponseFormat
from proxyserve.api.schemas.tools import ReasoningEffort, ToolBody, ToolChoice


def _scalars(value: Any) -> Any:
    if isinstance(value, dict):
        for name, entry in value.items():
            if not isinstance(entry, str | int | float):
                raise PydanticCustomError(
                    "scalar", f"Its values must be strings, numbers or booleans; '{name[:64]}' is not"
                )
    return value


TemplateVariables = Annotated[
    dict[str, Any],
    BeforeValidator(_scalars),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}),
    AtMost(MAX_ENTRIES),
]


class ChatRequest(GenerationRequest):
    """`max_tokens` (or its newer name `max_completion_tokens`) defaults to what is left of the context."""

    messages: Messages = Field(description="The conversation so far.")
    max_completion_tokens: Count | None = Field(None, description="The newer name of `max_tokens`.")
    logprobs: bool | None = Field(
        None, description="Give the log-probability of each generated token. Default false."
    )
    top_logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None, description="How many of the most likely tokens to give at each position; needs `logprobs`."
    )

    tools: Annotated[list[ToolBody], AtMost(MAX_ENTRIES)] | None = Field(
        None, description="Functions that the model may call; the client runs them."
    )
    tool_choice: ToolChoice | None = Field(
        None,
        description="`auto`, the default with tools: the model decides. `none`: the tools are not shown to it. "
        "`required`: it calls at least one. An object names the one that it must call, or those that it may.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false: the answer ends with its first call. Default true."
    )
    reasoning_effort: ReasoningEffort | None = Field(
        None, description="For chat templates that read `reasoning_effort`; refused where none does."
    )
    thinking_budget: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = Field(
        None,
        description="Most tokens of reasoning; then its end is forced. For models whose reasoning is told apart.",
    )
    chat_template_kwargs: TemplateVariables | None = Field(
        None,
        description="Variables for the chat template, such as `enable_thinking`; refused where no template reads them.",
    )
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt with the beginning of an assistant's turn. Default true."
    )
    continue_final_message: bool | None = Field(
        None, description="The answer continues the last message, an assistant's. Default false."
    )

    response_format: ResponseFormat | None = None

    audio: Annotated[Any, NotYet()] = None
    function_call: Annotated[Any, NotYet("none", instead="tool_choice")] = None
    functions: Annotated[Any, NotYet([], instead="tools")] = None
    modalities: Annotated[Any, NotYet(["text"])] = None
    prediction: Annotated[Any, NotYet()] = None
    store: Annotated[Any, NotYet(False)] = None
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


class FunctionCallBody(BaseModel):
    """`arguments` is JSON text as the model wrote it; check it before you use it."""

    name: str
    arguments: str


class ToolCallBody(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCallBody


class AssistantMessage(BaseModel):
    """`content` is null where the model has only called tools, or has not come to the end of its reasoning."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallBody] | None = Field(None, description="Only where the model has called tools.")
    reasoning: str | None = Field(None, description="What the model thought first, if it did.")
    reasoning_content: str | None = Field(None, description="The same, under the older name.")


class ChatChoice(ChoiceExtras):
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName
    explain: list[ExplainedToken] | None = Field(
        None, description="With `fusion.explain`: an entry per token."
    )
    grammar: GrammarReport | None = Field(None, description="With a required form: what it changed.")


class ChatCompletion(PromptExtras):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] | None = Field(None, description="For requests that name one.")
    choices: list[ChatChoice]
    usage: UsageBody
    fusion: FusionSummary | None = Field(
        None, description="Left out for requests to a plain base of this server."
    )


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """The first of a call has its id and name; `arguments` join to the call's."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatChunkChoice(ChoiceExtras):
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName | None
    explain: list[ExplainedToken] | None = Field(
        None, description="With `fusion.explain`: an entry per token."
    )
    grammar: GrammarReport | None = Field(
        None, description="With a required form: what it changed, on the choice's last chunk."
    )


class ChatChunk(PromptExtras):
    """One server-sent event. With `include_usage`, `usage` is null on all but the last, which has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] | None = Field(None, description="For requests that name one.")
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None
    fusion: FusionSummary | None = Field(None, description="On the last chunk of fused requests.")
