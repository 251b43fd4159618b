"""Server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxyserve.api.errors import problem_of
from proxyserve.api.presence import ServerStopping, while_present
from proxyserve.api.record import note_error
from proxyserve.errors import ProxyserveError

logger = logging.getLogger("proxyserve.api")

_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"

#: How long a client may take to read the error that ends its stream when the server stops.
_LAST_WORDS_SECONDS = 1.0


class EventStream(Response):
    """Sends each string of `events` as the data of one event, then `[DONE]`.

    If `events` raises, or `stopping` is set, an event in OpenAI's error shape comes instead of `[DONE]`. While nothing
    comes for `keep_alive` seconds a comment is sent, so that proxies keep the connection. A client that goes away, or
    that reads nothing for `patience` seconds, ends the stream. `events` is always closed before this returns.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        *,
        stopping: asyncio.Event,
        keep_alive: float = 15.0,
        patience: float = 60.0,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._stopping = stopping
        self._keep_alive = keep_alive
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = _Writer(send, self._patience)
        with suppress(ClientDisconnect):  # then nobody is left to tell
            async with aclosing(self._events):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    await while_present(self._send_events(writer, scope), receive, self._stopping)
                except ServerStopping as error:
                    writer.patience = _LAST_WORDS_SECONDS
                    await writer.write(_error_event(error, scope))
            await writer.end()

    async def _send_events(self, writer: _Writer, scope: Scope) -> None:
        keeper = asyncio.ensure_future(writer.keep_alive(self._keep_alive))
        try:
            async for data in self._events:
                await writer.write(f"data: {data}\n\n".encode())
            await writer.write(_DONE)
        except ClientDisconnect:
            raise
        except Exception as error:
            if not isinstance(error, ProxyserveError):
                logger.exception("a stream failed")
            await writer.write(_error_event(error, scope))
        finally:
            keeper.cancel()


class _Writer:
    """Sends pieces of a body one at a time. Raises ClientDisconnect if one is not taken within `patience` seconds."""

    def __init__(self, send: Send, patience: float) -> None:
        self.patience = patience
        self._send = send
        self._turn = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()

    async def write(self, piece: bytes, *, more: bool = True) -> None:
        async with self._turn:
            try:
                async with asyncio.timeout(self.patience):
                    await self._send({"type": "http.response.body", "body": piece, "more_body": more})
            except (TimeoutError, OSError) as error:
                raise ClientDisconnect from error
            self._last = self._loop.time()

    async def end(self) -> None:
        await self.write(b"", more=False)

    async def keep_alive(self, interval: float) -> None:
        """Write a comment whenever nothing was written for `interval` seconds, until cancelled or nobody reads."""
        with suppress(ClientDisconnect):
            while True:
                quiet = self._loop.time() - self._last
                if quiet >= interval:
                    await self.write(_KEEP_ALIVE)
                else:
                    await asyncio.sleep(interval - quiet)


def _error_event(error: Exception, scope: Scope) -> bytes:
    problem = problem_of(error)
    note_error(scope, problem.detail.code)
    return f"data: {problem.body}\n\n".encode()
