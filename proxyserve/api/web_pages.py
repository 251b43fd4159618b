"""Keeps pages of other sites away from a server without keys.

Whoever connects to such a server is its administrator, and the browser of a user of this machine connects for any page
that it shows. A page cannot read what the server answers, but it can send what needs no answer (`POST
/admin/v1/drain`), and one whose name leads to 127.0.0.1 from one moment to the next (DNS rebinding) can read it, too.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from proxyserve.api.errors import error_response, problem_of
from proxyserve.api.metrics import Metrics
from proxyserve.errors import Forbidden

_CHANGES_NOTHING = frozenset({"GET", "HEAD", "OPTIONS"})


class WebPagesMiddleware:
    """Refuses requests that a page of another site sent, unless that is one of `origins`; only for servers without
    keys."""

    def __init__(self, app: ASGIApp, metrics: Metrics, origins: Collection[str] = ()) -> None:
        self._app = app
        self._metrics = metrics
        self._origins = frozenset(origins)
        self._names = frozenset(_name(origin) for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is not None:
            self._metrics.rejected("forbidden")
            await error_response(problem_of(refusal))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Forbidden | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host"), headers.get("origin")
        own, _ = scope.get("server") or ("", None)  # the ASGI server need not say it
        if host is not None and not self._is_here(_name(f"//{host}"), own):
            return Forbidden(
                f"This server has no keys, so it answers to this machine's own names alone, not to '{host}'. Call it "
                "at http://127.0.0.1, or start it with --cors-origin and the address that it is called at, or with "
                "keys (--api-key-file)."
            )
        if origin is None or origin in self._origins or scope["method"] in _CHANGES_NOTHING:
            return None
        if self._is_here(_name(origin), own):
            return None
        return Forbidden(
            f"This server has no keys, so pages of other sites ('{origin}') may not call it. Start it with "
            "--cors-origin and that origin, or with keys (--api-key-file)."
        )

    def _is_here(self, name: str | None, own: str) -> bool:
        if name is None:
            return False
        if name in (own, "localhost") or name.endswith(".localhost") or name in self._names:
            return True
        try:
            return ip_address(name).is_loopback
        except ValueError:
            return False


def _name(url: str) -> str | None:
    """Of the host, without its port; None where there is none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
