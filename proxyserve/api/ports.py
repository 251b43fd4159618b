"""The control plane on a port of its own."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from proxyserve.api.errors import Problem, error_response
from proxyserve.api.playground import FOLDER, PAGE

#: What both ports answer.
_SHARED = ("/health", "/ready", "/version", "/load", "/metrics", "/docs", "/openapi.json")


class PortMiddleware:
    """Answers 404 to `/admin` on every port but `admin_port`, and there to everything that is not for operators. The
    playground is on both: its panel of experts calls the port that it came from."""

    def __init__(self, app: ASGIApp, admin_port: int) -> None:
        self._app = app
        self._admin_port = admin_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_here(scope):
            problem = Problem.of(404, "There is no such route on this port.", code="route_not_found")
            await error_response(problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_here(self, scope: Scope) -> bool:
        path: str = scope["path"]
        if path in _SHARED or path == PAGE or path.startswith(FOLDER):
            return True
        of_admin = path == "/admin" or path.startswith("/admin/")
        return of_admin == (scope["server"][1] == self._admin_port)
