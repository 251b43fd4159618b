"""What happens to a connection before there is a request: limits on what nobody has asked a key for yet."""

from __future__ import annotations

import asyncio
import http
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState as UvicornState

from proxyserve.api.errors import Problem
from proxyserve.config import Limits

#: How long a client may go on sending what nobody reads, to come to reading why it was refused.
_LINGER_SECONDS = 2.0


class ProtocolConfig(uvicorn.Config):
    """uvicorn's settings and ours."""

    def __init__(self, app: Any, limits: Limits, **settings: Any) -> None:
        super().__init__(app, http=GuardedProtocol, **settings)
        self.limits = limits


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP, with an end to what clients can make the server hold: `Limits.max_connections` connections at
    once (503), `max_headers` headers of `max_header_bytes` together with the request line (431), and `header_seconds`
    from the connection, or the first byte of a later request, until the headers are complete (408, or nothing if not a
    byte has come). Every refusal is in OpenAI's shape and closes the connection."""

    config: ProtocolConfig

    def __init__(
        self,
        config: ProtocolConfig,
        server_state: UvicornState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = config.limits
        self._in_head = True
        self._came = 0  # bytes of a head that is not complete
        self._size = 0  # of the head's parts so far
        self._refusal: Problem | None = None
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None

    # The transport's calls -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # a transport of a stream
        if len(self.connections) > self._limits.max_connections:
            self._refuse(
                Problem.of(
                    503,
                    f"The server has {self._limits.max_connections} connections, as many as it takes; try again later.",
                    code="too_many_connections",
                    headers={"Retry-After": "1"},
                )
            )
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._in_head:
            self._came += len(data)
            self._start_timer()
        super().data_received(data)
        if self._in_head and self._came > self._limits.max_header_bytes and not self._refused:
            self._refuse(self._too_large())

    # The parser's calls --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._in_head, self._size = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._add(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._add(len(name) + len(value) + 4)
        super().on_header(name, value)
        if len(self.headers) > self._limits.max_headers:
            raise self._stop(
                Problem.of(
                    431,
                    f"The request has more than {self._limits.max_headers} headers.",
                    code="headers_too_large",
                )
            )

    def on_headers_complete(self) -> None:
        self._in_head, self._came = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._came = True, 0
        super().on_message_complete()

    def _add(self, size: int) -> None:
        self._size += size
        if self._size > self._limits.max_header_bytes:
            raise self._stop(self._too_large())

    def _too_large(self) -> Problem:
        return Problem.of(
            431,
            f"The request's headers are above {self._limits.max_header_bytes} bytes.",
            code="headers_too_large",
        )

    def _stop(self, problem: Problem) -> ValueError:
        """For the parser's calls: raised, it ends the parsing, and then `send_400_response` is called."""
        self._refusal = problem
        return ValueError(problem.detail.message)

    # Answers without a request -------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or Problem.of(400, "This is not HTTP/1.1.", code="invalid_http"))

    def _refuse(self, problem: Problem) -> None:
        body = problem.body.encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **problem.headers,
        }
        lines = [f"HTTP/1.1 {problem.status} {http.HTTPStatus(problem.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
        self._refused = True
        self._stop_timer()
        if (
            self.transport.can_write_eof()
        ):  # closed at once, a client that still sends would see that and no answer
            self.transport.write_eof()
            self._timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._limits.header_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if not self._came:
            self.transport.close()
            return
        seconds = self._limits.header_seconds
        self._refuse(
            Problem.of(
                408,
                f"The request's headers did not come within {seconds:g} seconds.",
                code="headers_too_slow",
            )
        )
