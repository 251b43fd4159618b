"""The events of a streamed response, in the order in which they first come.

`sequence_number` counts all events of a stream from 0. `output_index` is an item's place in the response's `output`,
`content_index` a part's place in the item's `content`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, RootModel

from proxyserve.api.schemas.chat import ChatTokenLogprob
from proxyserve.api.schemas.response_output import ContentPart, OutputItem, ResponseObject


class _Event(BaseModel):
    type: str
    sequence_number: int


class _OfItem(_Event):
    output_index: int
    item_id: str


class _OfPart(_OfItem):
    content_index: int


class ResponseCreated(_Event):
    type: Literal["response.created"]
    response: ResponseObject


class ResponseInProgress(_Event):
    type: Literal["response.in_progress"]
    response: ResponseObject


class OutputItemAdded(_Event):
    type: Literal["response.output_item.added"]
    output_index: int
    item: OutputItem


class ContentPartAdded(_OfPart):
    type: Literal["response.content_part.added"]
    part: ContentPart


class ReasoningTextDelta(_OfPart):
    type: Literal["response.reasoning_text.delta"]
    delta: str


class ReasoningTextDone(_OfPart):
    type: Literal["response.reasoning_text.done"]
    text: str


class OutputTextDelta(_OfPart):
    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[ChatTokenLogprob]


class OutputTextDone(_OfPart):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[ChatTokenLogprob]


class ContentPartDone(_OfPart):
    type: Literal["response.content_part.done"]
    part: ContentPart


class ArgumentsDelta(_OfItem):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(_OfItem):
    type: Literal["response.function_call_arguments.done"]
    arguments: str


class OutputItemDone(_Event):
    type: Literal["response.output_item.done"]
    output_index: int
    item: OutputItem


class ResponseCompleted(_Event):
    type: Literal["response.completed"]
    response: ResponseObject


class ResponseIncomplete(_Event):
    """`max_output_tokens`, or the context, ended it."""

    type: Literal["response.incomplete"]
    response: ResponseObject


class ResponseFailed(_Event):
    """The server could not finish it; `output` has what there is."""

    type: Literal["response.failed"]
    response: ResponseObject


AnyEvent = (
    ResponseCreated
    | ResponseInProgress
    | OutputItemAdded
    | ContentPartAdded
    | ReasoningTextDelta
    | ReasoningTextDone
    | OutputTextDelta
    | OutputTextDone
    | ContentPartDone
    | ArgumentsDelta
    | ArgumentsDone
    | OutputItemDone
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
)


class ResponseStreamEvent(RootModel[Annotated[AnyEvent, Field(discriminator="type")]]):
    """One event of a streamed response."""
