"""Routes that put the engine to work."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from proxyserve.api.body import JsonRoute
from proxyserve.api.state import server_state


class GenerationRoute(JsonRoute):
    """Refuses a request that would find no room before its body is read: nothing is parsed, rendered or encoded for
    nothing. Raises NotReady or QueueFull."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def admit_and_handle(request: Request) -> Response:
            server_state(request).engine.check_room(request.state.caller)
            return await handle(request)

        return admit_and_handle
