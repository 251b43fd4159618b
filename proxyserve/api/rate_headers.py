"""What is left of a key's limits per minute, in OpenAI's headers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxyserve.engine.admission import RateState
from proxyserve.engine.caller import Caller

RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{name}"
    for what in ("limit", "remaining", "reset")
    for name in ("requests", "tokens")
)


class RateHeadersMiddleware:
    """Adds `x-ratelimit-limit-…`, `-remaining-…` and `-reset-…` for requests and tokens to every answer to a key with
    such a limit. They are as of the answer's beginning."""

    def __init__(self, app: ASGIApp, rates: Callable[[Caller], Mapping[str, RateState]]) -> None:
        self._app = app
        self._rates = rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller: Caller = scope["state"]["caller"]
        limits = caller.limits
        if limits.requests_per_minute is None and limits.tokens_per_minute is None:
            await self._app(scope, receive, send)
            return

        async def send_with_rates(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, state in self._rates(caller).items():
                    headers[f"x-ratelimit-limit-{name}"] = str(state.limit)
                    headers[f"x-ratelimit-remaining-{name}"] = str(state.remaining)
                    headers[f"x-ratelimit-reset-{name}"] = f"{state.reset:.3f}s"
            await send(message)

        await self._app(scope, receive, send_with_rates)
