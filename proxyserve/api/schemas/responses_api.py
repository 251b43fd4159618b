"""The body of requests to `/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from proxyserve.api.schemas.base import MAX_ENTRIES, AtMost, NotYet, RequestModel
from proxyserve.api.schemas.common import Count, SampledRequest
from proxyserve.api.schemas.response_input import Input
from proxyserve.api.schemas.response_tools import FunctionTool, TextConfig, ToolChoice
from proxyserve.api.schemas.tools import ReasoningEffort

_UNABRIDGED = "Leave it out: reasoning comes in full."
_STATELESS = "Nothing is stored here; leave it out, and send the items of earlier responses in 'input'."


class ResponseStreamOptions(RequestModel):
    include_obfuscation: Annotated[Any, NotYet(False)] = None


class ReasoningConfig(RequestModel):
    effort: ReasoningEffort | None = Field(
        None, description="For chat templates that read `reasoning_effort`; refused where none does."
    )
    context: Annotated[Any, NotYet("auto")] = None
    generate_summary: Annotated[Any, NotYet(advice=_UNABRIDGED)] = None
    mode: Annotated[Any, NotYet("standard")] = None
    summary: Annotated[Any, NotYet(advice=_UNABRIDGED)] = None


class ResponsesRequest(SampledRequest):
    input: Input = Field(description="A text, or the items of a conversation.")
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: Count | None = Field(
        None,
        description="Most tokens of reasoning, text and calls together. Default: what is left of the context.",
    )
    include: Annotated[list[Literal["message.output_text.logprobs"]], AtMost(MAX_ENTRIES)] | None = Field(
        None,
        description="`message.output_text.logprobs`: give the log-probability of each token of the text.",
    )
    top_logprobs: Annotated[int, Field(ge=0)] | None = Field(
        None, description="How many of the most likely tokens to give at each position; needs `include`."
    )
    tools: Annotated[list[FunctionTool], AtMost(MAX_ENTRIES)] | None = Field(
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
    text: TextConfig | None = Field(
        None, description="`format`: the form that the text must have, as `response_format` of chats has it."
    )
    reasoning: ReasoningConfig | None = Field(
        None,
        description="`effort`, for chat templates that read `reasoning_effort`; refused where none does.",
    )
    stream_options: ResponseStreamOptions | None = Field(None, description="Only with `stream`.")

    background: Annotated[Any, NotYet(False)] = None
    context_management: Annotated[Any, NotYet([])] = None
    conversation: Annotated[Any, NotYet(advice=_STATELESS)] = None
    max_tool_calls: Annotated[Any, NotYet()] = None
    previous_response_id: Annotated[Any, NotYet(advice=_STATELESS)] = None
    prompt: Annotated[Any, NotYet()] = None
    store: Annotated[Any, NotYet(False, advice=_STATELESS)] = None
    truncation: Annotated[Any, NotYet("disabled")] = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.include)
