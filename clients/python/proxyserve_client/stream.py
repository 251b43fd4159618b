"""Answers that arrive piece by piece.

A stream sends its request when it is entered (`with`, `async with`) or first iterated, and ends it when it is left:
leaving early closes the connection, and the server stops generating.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from openai import AsyncStream, Stream
from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from pydantic import BaseModel

from proxyserve_client.explain import ExplainedToken
from proxyserve_client.reply import Choice, FusionReport, Reply, ToolCall, Usage, explained

Chunk = ChatCompletionChunk | Completion


@dataclass(frozen=True, slots=True)
class Piece:
    """What choice `index` grew by: text, or `reasoning` in front of it. `finish_reason` is set on the last piece of a
    choice, whose text may be empty. `explain` has the piece's tokens where the fusion asked for it. `raw` is the chunk
    it came in, for log-probs and calls of tools."""

    text: str
    index: int
    finish_reason: str | None
    raw: Chunk
    reasoning: str = ""
    explain: tuple[ExplainedToken, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.text or self.reasoning or self.explain or self.finish_reason or self._calls)

    @property
    def _calls(self) -> bool:
        own = (choice for choice in self.raw.choices if choice.index == self.index)
        return any(getattr(getattr(choice, "delta", None), "tool_calls", None) for choice in own)


class _GatheredChoice:
    """What a stream has brought of one choice."""

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.reasoning = ""
        self.explain: list[ExplainedToken] = []
        self.token_ids: list[int] = []
        self.calls: dict[int, ToolCall] = {}

    def add(self, piece: Piece, choice: BaseModel) -> None:
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.explain += piece.explain
        self.finish_reason = piece.finish_reason or self.finish_reason
        extras = choice.model_extra or {}
        self.stop_reason = extras.get("stop_reason") or self.stop_reason
        self.token_ids += extras.get("token_ids") or ()
        for call in getattr(getattr(choice, "delta", None), "tool_calls", None) or ():
            known = self.calls.get(call.index, ToolCall("", "", ""))
            self.calls[call.index] = ToolCall(
                call.id or known.id,
                call.function.name or known.name,
                known.arguments + (call.function.arguments or ""),
            )

    def choice(self) -> Choice:
        return Choice(
            self.text,
            self.finish_reason,
            self.stop_reason,
            token_ids=tuple(self.token_ids) or None,
            explain=tuple(self.explain) or None,
            reasoning=self.reasoning or None,
            tool_calls=tuple(self.calls[index] for index in sorted(self.calls)),
        )


class _Gathered:
    """What a stream has brought so far."""

    def __init__(self) -> None:
        self.id = ""
        self.model = ""
        self.choices: dict[int, _GatheredChoice] = {}
        self.usage: Usage | None = None
        self.fusion: FusionReport | None = None

    def add(self, chunk: Chunk) -> list[Piece]:
        """Take in one chunk; gives the pieces in it."""
        self.id, self.model = chunk.id, chunk.model
        if chunk.usage is not None:
            self.usage = Usage.of(chunk.usage)
        self.fusion = FusionReport.of(chunk) or self.fusion
        pieces = []
        for choice in chunk.choices:
            piece = _piece(chunk, choice)
            self.choices.setdefault(piece.index, _GatheredChoice()).add(piece, choice)
            pieces.append(piece)
        return [piece for piece in pieces if piece]

    def reply(self) -> Reply:
        choices = tuple(self.choices[index].choice() for index in sorted(self.choices))
        return Reply(self.model, choices or (Choice("", None),), self.usage, self.fusion, self.id)


def _piece(chunk: Chunk, choice: ChunkChoice | CompletionChoice) -> Piece:
    explain = explained(choice) or ()
    if isinstance(choice, ChunkChoice):
        reasoning = (choice.delta.model_extra or {}).get("reasoning_content") or ""
        text = choice.delta.content or ""
        return Piece(text, choice.index, choice.finish_reason, chunk, reasoning, explain)
    # Here `openai`'s types promise a finish reason; in a stream it is None until the last chunk.
    return Piece(choice.text, choice.index, choice.finish_reason, chunk, "", explain)


class TextStream:
    """Iterates over `Piece`s. After the last one `reply` is the whole answer, with usage and fusion report."""

    def __init__(self, send: Callable[[], Stream[ChatCompletionChunk] | Stream[Completion]]) -> None:
        self._send = send
        self._gathered = _Gathered()
        self._stream: Stream[ChatCompletionChunk] | Stream[Completion] | None = None
        self._iterator: Iterator[Piece] | None = None

    @property
    def reply(self) -> Reply:
        """What has arrived so far. Usage and fusion report come with the end of the stream."""
        return self._gathered.reply()

    def __enter__(self) -> Self:
        self._opened()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def id(self) -> str:
        """Of the answer, which `client.cancel` takes; empty before the first piece."""
        return self._gathered.id

    def tokens(self) -> Iterator[ExplainedToken]:
        """Instead of the pieces, their tokens one by one, with what every lane thought of them. Of all choices, so use
        the pieces where `n` is above 1. There are none unless the fusion has `explain`."""
        for piece in self:
            yield from piece.explain

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        if self._iterator is None:
            self._iterator = self._run()
        return next(self._iterator)

    def _run(self) -> Iterator[Piece]:
        stream = self._opened()
        with self:
            for chunk in stream:
                yield from self._gathered.add(chunk)

    def _opened(self) -> Stream[ChatCompletionChunk] | Stream[Completion]:
        if self._stream is None:
            self._stream = self._send()
        return self._stream

    def close(self) -> None:
        """End the request, finished or not. Calling it again does nothing."""
        if self._stream is not None:
            self._stream.close()


class AsyncTextStream:
    """`TextStream` for `async for` and `async with`."""

    def __init__(
        self, send: Callable[[], Awaitable[AsyncStream[ChatCompletionChunk] | AsyncStream[Completion]]]
    ) -> None:
        self._send = send
        self._gathered = _Gathered()
        self._stream: AsyncStream[ChatCompletionChunk] | AsyncStream[Completion] | None = None
        self._iterator: AsyncIterator[Piece] | None = None

    @property
    def reply(self) -> Reply:
        """What has arrived so far. Usage and fusion report come with the end of the stream."""
        return self._gathered.reply()

    async def __aenter__(self) -> Self:
        await self._opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def id(self) -> str:
        """Of the answer, which `client.cancel` takes; empty before the first piece."""
        return self._gathered.id

    async def tokens(self) -> AsyncIterator[ExplainedToken]:
        """Instead of the pieces, their tokens one by one, with what every lane thought of them. Of all choices, so use
        the pieces where `n` is above 1. There are none unless the fusion has `explain`."""
        async for piece in self:
            for token in piece.explain:
                yield token

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._iterator is None:
            self._iterator = self._run()
        return await anext(self._iterator)

    async def _run(self) -> AsyncIterator[Piece]:
        stream = await self._opened()
        async with self:
            async for chunk in stream:
                for piece in self._gathered.add(chunk):
                    yield piece

    async def _opened(self) -> AsyncStream[ChatCompletionChunk] | AsyncStream[Completion]:
        if self._stream is None:
            self._stream = await self._send()
        return self._stream

    async def close(self) -> None:
        """End the request, finished or not. Calling it again does nothing."""
        if self._stream is not None:
            await self._stream.close()
