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
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from proxyserve_client.reply import Choice, FusionReport, Reply, Usage

Chunk = ChatCompletionChunk | Completion


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that choice `index` grew by. `finish_reason` is set on the last piece of a choice, whose text may be
    empty. `raw` is the chunk it came in, for log-probs."""

    text: str
    index: int
    finish_reason: str | None
    raw: Chunk


class _Gathered:
    """What a stream has brought so far."""

    def __init__(self) -> None:
        self.model = ""
        self.texts: dict[int, str] = {}
        self.finish_reasons: dict[int, str | None] = {}
        self.usage: Usage | None = None
        self.fusion: FusionReport | None = None

    def add(self, chunk: Chunk) -> list[Piece]:
        """Take in one chunk; gives the pieces in it."""
        self.model = chunk.model
        if chunk.usage is not None:
            self.usage = Usage.of(chunk.usage)
        self.fusion = FusionReport.of(chunk) or self.fusion
        return [piece for piece in _pieces(chunk) if self._keep(piece)]

    def _keep(self, piece: Piece) -> bool:
        self.texts[piece.index] = self.texts.get(piece.index, "") + piece.text
        if piece.finish_reason is not None:
            self.finish_reasons[piece.index] = piece.finish_reason
        return bool(piece.text) or piece.finish_reason is not None

    def reply(self) -> Reply:
        choices = (Choice(self.texts[i], self.finish_reasons.get(i)) for i in sorted(self.texts))
        return Reply(self.model, tuple(choices) or (Choice("", None),), self.usage, self.fusion)


def _pieces(chunk: Chunk) -> Iterator[Piece]:
    if isinstance(chunk, ChatCompletionChunk):
        for choice in chunk.choices:
            yield Piece(choice.delta.content or "", choice.index, choice.finish_reason, chunk)
    else:
        for entry in chunk.choices:
            # Here `openai`'s types promise a finish reason; in a stream it is None until the last chunk.
            yield Piece(entry.text, entry.index, entry.finish_reason, chunk)


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
