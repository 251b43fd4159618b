"""Refuses bodies that are too large before they are read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxyserve.api.errors import BodyTooLarge, error_response, problem_of
from proxyserve.api.metrics import Metrics


class BodyLimitMiddleware:
    """Answers 413 to a body that announces more than `max_bytes`, and raises `BodyTooLarge` from `receive` once a body
    without a (true) length has brought more. Bytes above the limit are never kept."""

    def __init__(self, app: ASGIApp, max_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        # More than 15 digits are too many whatever they are, and Python refuses to read thousands of them.
        if announced.isdecimal() and (len(announced) > 15 or int(announced) > self._max_bytes):
            self._metrics.rejected("too_large")
            await error_response(problem_of(self._refusal()))(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise self._refusal()
            return message

        await self._app(scope, receive_limited, send)

    def _refusal(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is too large; this server takes at most {self._max_bytes} bytes.")
