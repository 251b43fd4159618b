"""Bodies of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from proxyserve.api.schemas.base import NotYet, RequestModel
from proxyserve.api.schemas.common import Count, GenerationRequest
from proxyserve.api.schemas.fusion import FusionSummary
from proxyserve.api.schemas.responses import FinishReasonName, UsageBody


def _join_parts(value: Any) -> Any:
    """A list of text parts as one text, a line each."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            raise PydanticCustomError(
                "content_part", f"Part {index} is not text; other parts are not supported yet"
            )
        if not isinstance(part, dict) or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError(
                "content_part", f'Part {index} must be {{"type": "text", "text": string}}'
            )
        texts.append(part["text"])
    return "\n".join(texts)


Content = Annotated[
    str,
    BeforeValidator(_join_parts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "description": "Text parts; they are joined with line breaks.",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]


class Message(RequestModel):
    """One turn. `developer` is OpenAI's newer name for `system` and is rendered as that."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    # Set on messages that clients send back as they came from an assistant.
    annotations: Annotated[Any, NotYet([])] = None
    audio: Annotated[Any, NotYet()] = None
    function_call: Annotated[Any, NotYet()] = None
    name: Annotated[Any, NotYet()] = None
    refusal: Annotated[Any, NotYet()] = None
    tool_calls: Annotated[Any, NotYet([])] = None

    def rendered(self) -> dict[str, str]:
        """As chat templates want it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


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


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody
    fusion: FusionSummary | None = Field(None, description="Left out for requests to the plain base.")


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName | None


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
