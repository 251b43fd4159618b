"""The event stream itself, without a network: keep-alives, slow and lost readers, stopping."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from starlette.types import Message

from proxyserve.api.sse import EventStream, event_frame


class Connection:
    """Records what is sent; `receive` reports a disconnect once `leave` was called."""

    def __init__(self, *, stuck_after: int = 1000) -> None:
        self.sent: list[Message] = []
        self.gone = asyncio.Event()
        self._stuck_after = stuck_after

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if len(self.sent) >= self._stuck_after:
            await asyncio.sleep(60)
        self.sent.append(message)

    @property
    def body(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def complete(self) -> bool:
        return self.sent[-1].get("more_body") is False


class Source:
    """Yields a frame per text, each after a pause, and remembers that it was closed."""

    def __init__(self, *texts: str, pause: float = 0.0) -> None:
        self._texts = texts
        self._pause = pause
        self.closed = False

    async def frames(self) -> AsyncGenerator[str, None]:
        try:
            for text in self._texts:
                await asyncio.sleep(self._pause)
                yield event_frame(text)
        finally:
            self.closed = True


async def run(
    source: Source,
    connection: Connection,
    *,
    keep_alive: float = 15.0,
    patience: float = 60.0,
    during: Callable[[asyncio.Event], None] | None = None,
) -> None:
    stopping = asyncio.Event()
    response = EventStream(source.frames(), stopping=stopping, keep_alive=keep_alive, patience=patience)
    task = asyncio.ensure_future(response({"type": "http"}, connection.receive, connection.send))
    await asyncio.sleep(0.05)
    if during is not None:
        during(stopping)
    await asyncio.wait_for(task, 5)


async def test_events_then_done() -> None:
    source, connection = Source("a", "b"), Connection()
    await run(source, connection)
    assert connection.sent[0]["type"] == "http.response.start"
    headers = dict(connection.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-cache"
    assert b"content-length" not in headers
    assert connection.body == "data: a\n\ndata: b\n\ndata: [DONE]\n\n"
    assert connection.complete
    assert source.closed


async def test_comments_while_nothing_comes() -> None:
    source, connection = Source("a", "b", pause=0.11), Connection()
    await run(source, connection, keep_alive=0.03)
    before, between = connection.body.split("data: a\n\n")
    assert before.count(": keep-alive\n\n") >= 2
    assert between.count(": keep-alive\n\n") >= 2
    assert connection.body.endswith("data: b\n\ndata: [DONE]\n\n")


async def test_no_comments_while_events_come() -> None:
    source, connection = Source(*"abcdefgh", pause=0.01), Connection()
    await run(source, connection, keep_alive=0.05)
    assert "keep-alive" not in connection.body


async def test_no_comments_after_the_end() -> None:
    connection = Connection()
    await run(Source("a"), connection, keep_alive=0.01)
    await asyncio.sleep(0.05)
    assert connection.body.endswith("data: [DONE]\n\n")
    assert connection.complete


async def test_lost_reader_ends_the_source() -> None:
    source, connection = Source("a", "b", pause=40), Connection()
    await run(source, connection, during=lambda _: connection.gone.set())
    assert source.closed
    assert not connection.complete


async def test_reader_that_reads_nothing_is_given_up() -> None:
    source, connection = Source("a", "b", "c"), Connection(stuck_after=2)
    await run(source, connection, patience=0.05)
    assert source.closed
    assert connection.body == "data: a\n\n"


async def test_comment_that_nobody_reads_ends_nothing_loudly() -> None:
    source, connection = Source("a", pause=0.2), Connection(stuck_after=1)
    await run(source, connection, keep_alive=0.01, patience=0.02)
    assert source.closed


async def test_stopping_server_says_so() -> None:
    source, connection = Source("a", *["b"] * 1000, pause=0.04), Connection()
    await run(source, connection, during=lambda stopping: stopping.set())
    assert source.closed
    assert connection.body.startswith("data: a\n\n")
    assert "shutting down" in connection.body
    assert "[DONE]" not in connection.body
    assert connection.complete
