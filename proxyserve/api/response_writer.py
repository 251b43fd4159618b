"""Writes one response of `/v1/responses`: the events by which it comes to be, and what it is in the end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, ClassVar, get_args

from proxyserve.api.respond import unique_id
from proxyserve.api.schemas.chat import ChatTokenLogprob
from proxyserve.api.schemas.response_events import AnyEvent
from proxyserve.api.schemas.response_output import (
    ContentPart,
    FunctionCall,
    IncompleteDetails,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseFailure,
    ResponseObject,
    ResponseStatus,
)
from proxyserve.text.answer import AnswerFormat
from proxyserve.text.pieces import CallArguments, CallBegun, Content, Piece, Reasoning
from proxyserve.types import FinishReason, OutputEvent, TokenLogprob

#: By name.
_EVENTS: Mapping[str, type[Any]] = {
    get_args(event.model_fields["type"].annotation)[0]: event for event in get_args(AnyEvent)
}

Logprobs = list[ChatTokenLogprob]


class ResponseWriter:
    """Call `begin` once, `take` with each event of the choice, then `end`; or `fail`, at any time, and nothing after
    it. Each gives the events to send, which are numbered when they are made: none may be left out.

    `fields` are those of the response that are known from the beginning. `form` says how the text is read. `named`
    writes the log-probabilities of tokens; without it there are none.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        form: AnswerFormat,
        named: Callable[[Sequence[TokenLogprob]], Logprobs] | None = None,
    ) -> None:
        self._fields = {"object": "response", "created_at": int(time.time()), **fields}
        self._reader = form.reader()
        self._named = named
        self._numbers = count()
        self._begun = False
        self._done: list[OutputItem] = []
        self._open: _Item | None = None
        self._logprobs: Logprobs = []
        self._finish_reason: FinishReason | None = None

    @property
    def reasoning_tokens(self) -> int:
        """Among those taken."""
        return self._reader.reasoning_tokens

    def begin(self) -> Iterator[AnyEvent]:
        self._begun = True
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))

    def take(self, event: OutputEvent) -> Iterator[AnyEvent]:
        if self._named is not None:
            self._logprobs += self._named(event.logprobs or ())
        for piece in self._reader.push(event.text, len(event.token_ids)):
            yield from self._write(piece)
        if event.finish_reason is not None:
            self._finish_reason = event.finish_reason
            for piece in self._reader.finish():
                yield from self._write(piece)

    def end(self, **more: Any) -> Iterator[AnyEvent]:
        """The last event has the whole response. `more` are fields of it that are known now: `usage` and the like."""
        if self._open is None and not self._done:
            yield from self._within(_Message)
        if self._logprobs and isinstance(self._open, _Message):
            yield from self._add("")
        if self._finish_reason is FinishReason.STOP:
            yield from self._close("completed")
            response = self._response("completed", completed_at=int(time.time()), **more)
            yield self._event("response.completed", response=response)
        else:
            yield from self._close("incomplete")
            details = IncompleteDetails(reason="max_output_tokens")
            response = self._response("incomplete", incomplete_details=details, **more)
            yield self._event("response.incomplete", response=response)

    def fail(self, message: str) -> Iterator[AnyEvent]:
        """The item that was being written is left as it is."""
        if not self._begun:  # clients know a stream by its first event
            yield from self.begin()
        error = ResponseFailure(code="server_error", message=message)
        if self._open is not None:
            self._done.append(self._open.item("incomplete"))
        yield self._event("response.failed", response=self._response("failed", error=error))

    def _write(self, piece: Piece) -> Iterator[AnyEvent]:
        match piece:
            case Content(text):
                yield from self._within(_Message)
                yield from self._add(text)
            case Reasoning(text):
                yield from self._within(_Reasoning)
                yield from self._add(text)
            case CallBegun(_, name):
                yield from self._begin_item(_Call(name))
            case CallArguments(_, text):
                yield from self._add(text)

    def _within(self, kind: type[_Item]) -> Iterator[AnyEvent]:
        if not isinstance(self._open, kind):
            yield from self._begin_item(kind())

    def _begin_item(self, item: _Item) -> Iterator[AnyEvent]:
        yield from self._close("completed")
        self._open = item
        yield self._event(
            "response.output_item.added", output_index=len(self._done), item=item.item("in_progress")
        )
        if isinstance(item, _ItemWithContent):
            yield self._of_item(item, "response.content_part.added", part=item.part())

    def _add(self, text: str) -> Iterator[AnyEvent]:
        """More text for the open item. Log-probabilities of tokens so far are a message's; other items have none."""
        assert self._open is not None
        logprobs, self._logprobs = self._logprobs, []
        name, fields = self._open.add(text, logprobs)
        yield self._of_item(self._open, name, **fields)

    def _close(self, status: ItemStatus) -> Iterator[AnyEvent]:
        item, self._open = self._open, None
        if item is None:
            return
        name, fields = item.end()
        yield self._of_item(item, name, **fields)
        if isinstance(item, _ItemWithContent):
            yield self._of_item(item, "response.content_part.done", part=item.part())
        done = item.item(status)
        yield self._event("response.output_item.done", output_index=len(self._done), item=done)
        self._done.append(done)

    def _of_item(self, item: _Item, name: str, **fields: Any) -> AnyEvent:
        if isinstance(item, _ItemWithContent):
            fields["content_index"] = 0
        return self._event(name, output_index=len(self._done), item_id=item.id, **fields)

    def _event(self, name: str, **fields: Any) -> AnyEvent:
        event: AnyEvent = _EVENTS[name](type=name, sequence_number=next(self._numbers), **fields)
        return event

    def _response(self, status: ResponseStatus, **more: Any) -> ResponseObject:
        fields = {"completed_at": None, "error": None, "incomplete_details": None, "usage": None, **more}
        return ResponseObject(**self._fields, status=status, output=list(self._done), **fields)


#: The name and the fields of an event.
_Said = tuple[str, dict[str, Any]]


class _Item(ABC):
    """An item of the output that is being written."""

    prefix: ClassVar[str]

    def __init__(self) -> None:
        self.id = unique_id(self.prefix)
        self.text = ""

    @abstractmethod
    def add(self, text: str, logprobs: Logprobs) -> _Said:
        """More text; the event tells of it."""

    @abstractmethod
    def end(self) -> _Said:
        """The event repeats the whole text."""

    @abstractmethod
    def item(self, status: ItemStatus) -> OutputItem:
        """The item, as it is now."""


class _ItemWithContent(_Item):
    """Its text is the one part of its content. As long as it is in progress it is shown without, since parts have
    events of their own."""

    @abstractmethod
    def part(self) -> ContentPart:
        """As it is now."""


class _Message(_ItemWithContent):
    prefix = "msg"

    def __init__(self) -> None:
        super().__init__()
        self._logprobs: Logprobs = []

    def add(self, text: str, logprobs: Logprobs) -> _Said:
        self.text += text
        self._logprobs += logprobs
        return "response.output_text.delta", {"delta": text, "logprobs": logprobs}

    def end(self) -> _Said:
        return "response.output_text.done", {"text": self.text, "logprobs": self._logprobs}

    def part(self) -> OutputText:
        return OutputText(type="output_text", text=self.text, annotations=[], logprobs=self._logprobs)

    def item(self, status: ItemStatus) -> OutputMessage:
        content = [] if status == "in_progress" else [self.part()]
        return OutputMessage(id=self.id, type="message", role="assistant", status=status, content=content)


class _Reasoning(_ItemWithContent):
    prefix = "rs"

    def add(self, text: str, logprobs: Logprobs) -> _Said:
        self.text += text
        return "response.reasoning_text.delta", {"delta": text}

    def end(self) -> _Said:
        return "response.reasoning_text.done", {"text": self.text}

    def part(self) -> ReasoningText:
        return ReasoningText(type="reasoning_text", text=self.text)

    def item(self, status: ItemStatus) -> ReasoningItem:
        content = [] if status == "in_progress" else [self.part()]
        return ReasoningItem(id=self.id, type="reasoning", status=status, summary=[], content=content)


class _Call(_Item):
    prefix = "fc"

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._call_id = unique_id("call")

    def add(self, text: str, logprobs: Logprobs) -> _Said:
        self.text += text
        return "response.function_call_arguments.delta", {"delta": text}

    def end(self) -> _Said:
        return "response.function_call_arguments.done", {"arguments": self.text}

    def item(self, status: ItemStatus) -> FunctionCall:
        return FunctionCall(
            id=self.id,
            type="function_call",
            status=status,
            call_id=self._call_id,
            name=self._name,
            arguments=self.text,
        )
