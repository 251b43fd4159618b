"""One HTTP exchange, with the time at which each piece of the answer came.

Half of a small machine may be the server's, and what the generator takes is missing there. So this is a bare protocol
over httptools, which the server's own dependencies bring: httpx takes about nine times as long per piece. Nothing is
decoded before the load is over.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from time import perf_counter
from urllib.parse import urlsplit

import httptools

from proxyserve.errors import ProxyserveError


@dataclass(frozen=True, slots=True)
class Address:
    """Where requests go. `key` is sent as a bearer token."""

    host: str
    port: int
    secure: bool
    path: str
    key: str | None = None

    @classmethod
    def parse(cls, url: str, route: str, key: str | None = None) -> Address:
        """`url` may end in /v1 or not; `route` is what follows that, for example `/completions`."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https"):
            raise ProxyserveError(f"'{url}' is no address of a server; write http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1") + "/v1" + route
        return cls(host, port or (443 if secure else 80), secure, path, key)

    def head(self, length: int) -> bytes:
        """The request line and the headers of a body of `length` bytes."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"POST {self.path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {length}",
            "Connection: close",
        ]
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


@dataclass(slots=True)
class Exchange:
    """What came back, as it came. Times are of `perf_counter`. `status` is 0 and `failure` says why where no whole
    answer came: "refused" (no connection), "cut" (closed before the end), "timeout", "malformed"."""

    began: float
    status: int = 0
    retry_after: float | None = None
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0
    failure: str | None = None


async def exchange(address: Address, body: bytes, *, patience: float) -> Exchange:
    """Send `body` over a connection of its own and read until the answer's end, for `patience` seconds at most. Raises
    nothing for what a server or network may do."""
    record = Exchange(began=perf_counter())
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(patience):
            transport, protocol = await asyncio.get_running_loop().create_connection(
                lambda: _Reader(record),
                address.host,
                address.port,
                ssl=ssl.create_default_context() if address.secure else None,
            )
            transport.write(address.head(len(body)) + body)
            await protocol.over
    except TimeoutError:
        record.failure = "timeout"
    except OSError:
        record.failure = "refused"
    finally:
        if transport is not None:
            transport.close()
        record.ended = perf_counter()
    return record


class _Reader(asyncio.Protocol):
    """Writes down what comes."""

    def __init__(self, record: Exchange) -> None:
        self._record = record
        self._parser = httptools.HttpResponseParser(self)
        self._now = record.began
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end("malformed")

    def connection_lost(self, error: Exception | None) -> None:
        self._end("cut")

    # What the parser finds.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after" and value.isdigit():
            self._record.retry_after = float(value)

    def on_headers_complete(self) -> None:
        self._record.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._record.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        self._end(None)

    def _end(self, failure: str | None) -> None:
        if not self.over.done():
            self._record.failure = failure
            self.over.set_result(None)
