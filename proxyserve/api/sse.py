"""Server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxyserve.api.errors import Problem, problem_of
from proxyserve.api.presence import ServerStopping, while_present
from proxyserve.api.record import note_error
from proxyserve.errors import ProxyserveError

logger = logging.getLogger("proxyserve.api")

_KEEP_ALIVE = ": keep-alive\n\n"

#: How long a client may take to read the error that ends its stream when the server stops.
_LAST_WORDS_SECONDS = 1.0


def event_frame(data: str, name: str | None = None) -> str:
    """One event as it is sent. `data` is one line; clients that listen for `name` get no other events."""
    return f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n"


def _error_frame(problem: Problem) -> str:
    return event_frame(problem.body)


class EventStream(Response):
    """Sends `frames`, then `[DONE]` or another `last` frame.

    If `frames` raises, or `stopping` is set, what `failed` makes of the problem comes instead: by default an event in
    OpenAI's error shape. While nothing comes for `keep_alive` seconds a comment is sent, so that proxies keep the
    connection. A client that goes away, or that reads nothing for `patience` seconds, ends the stream. `frames` is
    always closed before this returns.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[str, None],
        *,
        stopping: asyncio.Event,
        last: str = event_frame("[DONE]"),
        failed: Callable[[Problem], str] = _error_frame,
        keep_alive: float = 15.0,
        patience: float = 60.0,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._stopping = stopping
        self._last = last
        self._failed = failed
        self._keep_alive = keep_alive
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = _Writer(send, self._patience)
        with suppress(ClientDisconnect):  # then nobody is left to tell
            async with aclosing(self._frames):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    await while_present(self._send_frames(writer, scope), receive, self._stopping)
                except ServerStopping as error:
                    writer.patience = _LAST_WORDS_SECONDS
                    await writer.write(self._last_words(error, scope))
            await writer.end()

    async def _send_frames(self, writer: _Writer, scope: Scope) -> None:
        keeper = asyncio.ensure_future(writer.keep_alive(self._keep_alive))
        try:
            async for frame in self._frames:
                await writer.write(frame)
            if self._last:
                await writer.write(self._last)
        except ClientDisconnect:
            raise
        except Exception as error:
            if not isinstance(error, ProxyserveError):
                logger.exception("a stream failed")
            await writer.write(self._last_words(error, scope))
        finally:
            keeper.cancel()

    def _last_words(self, error: Exception, scope: Scope) -> str:
        problem = problem_of(error)
        note_error(scope, problem.detail.code)
        return self._failed(problem)


class _Writer:
    """Sends pieces of a body one at a time. Raises ClientDisconnect if one is not taken within `patience` seconds."""

    def __init__(self, send: Send, patience: float) -> None:
        self.patience = patience
        self._send = send
        self._turn = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()

    async def write(self, piece: str, *, more: bool = True) -> None:
        async with self._turn:
            try:
                async with asyncio.timeout(self.patience):
                    await self._send(
                        {"type": "http.response.body", "body": piece.encode(), "more_body": more}
                    )
            except (TimeoutError, OSError) as error:
                raise ClientDisconnect from error
            self._last = self._loop.time()

    async def end(self) -> None:
        await self.write("", more=False)

    async def keep_alive(self, interval: float) -> None:
        """Write a comment whenever nothing was written for `interval` seconds, until cancelled or nobody reads."""
        with suppress(ClientDisconnect):
            while True:
                quiet = self._loop.time() - self._last
                if quiet >= interval:
                    await self.write(_KEEP_ALIVE)
                else:
                    await asyncio.sleep(interval - quiet)
