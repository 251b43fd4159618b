"""Refuses bodies that are too large before they are read, and those that do not come to their end."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxyserve.api.errors import BodyTooLarge, BodyTooSlow, error_response, problem_of
from proxyserve.api.metrics import Metrics


class BodyLimitMiddleware:
    """Answers 413 to a body that announces more than `max_bytes`, and raises `BodyTooLarge` from `receive` once a body
    without a (true) length has brought more, and `BodyTooSlow` if it is not complete after `seconds`. Bytes above the
    limit are never kept."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float, metrics: Metrics) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds
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
        deadline: float | None = asyncio.get_running_loop().time() + self._seconds

        async def receive_limited() -> Message:
            nonlocal received, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(
                    f"The body did not come to its end within {self._seconds:g} seconds."
                ) from None
            if message["type"] == "http.request":
                if not message.get("more_body"):
                    deadline = None  # from here on, it waits for the client to leave
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise self._refusal()
            return message

        await self._app(scope, receive_limited, send)

    def _refusal(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is too large; this server takes at most {self._max_bytes} bytes.")
