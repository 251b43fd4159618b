"""Who is asking. Every route needs a key but those in `PUBLIC_PATHS` and the playground's files; without a key file
nobody needs one and the server listens on loopback addresses only (`server.check_binding`)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from proxyserve.api.errors import Unauthorized, error_response, problem_of
from proxyserve.api.key_ring import Keys, KnownKey
from proxyserve.engine.caller import Caller
from proxyserve.errors import Forbidden

if TYPE_CHECKING:
    from proxyserve.api.metrics import Metrics

#: The routes that anyone may call, beside the playground's files. A test walks all other routes and shows that they
#: refuse.
PUBLIC_PATHS = frozenset({"/health", "/ready", "/version"})

#: All that a key of role `monitor` is for. `METRICS` is not for users: it has the names of all keys and experts.
METRICS = "/metrics"
_WATCHING = frozenset({METRICS, "/load"})

#: Whoever calls a public route of a server with keys: they may do nothing.
_NOBODY = Caller(admin=False, experts=frozenset(), explain=False)


class AuthMiddleware:
    """Refuses requests without a known key, or with one that is not for their route, before their body is read (the
    control plane refuses users itself). Sets `state.salt`, which keeps the prefix-cache
    entries of different keys apart, and `state.caller`: on whose behalf the request is."""

    def __init__(
        self, app: ASGIApp, keys: Keys, metrics: Metrics, public: frozenset[str] = PUBLIC_PATHS
    ) -> None:
        self._app = app
        self._public = public
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan; there are no websocket routes
            await self._app(scope, receive, send)
            return
        salt, caller = "", Caller()
        if self._keys.required:
            caller = _NOBODY
            if scope["path"] not in self._public:
                key = self._keys.ring.match(_bearer_token(scope))
                if key is None or key.expired:
                    self._metrics.rejected("unauthorized")
                    await error_response(problem_of(_unauthorized(key)))(scope, receive, send)
                    return
                caller = key.caller
                refusal = _not_for(caller, scope["path"])
                if refusal is not None:
                    self._metrics.rejected("forbidden")
                    await error_response(problem_of(refusal))(scope, receive, send)
                    return
                salt = hashlib.sha256(b"prefix-cache" + key.digest).hexdigest()
        scope.setdefault("state", {}).update(salt=salt, caller=caller)
        await self._app(scope, receive, send)


def _unauthorized(key: KnownKey | None) -> Unauthorized:
    return Unauthorized(
        "This server needs a key: send 'Authorization: Bearer KEY' with a known one."
        if key is None
        else "This key has expired; ask the operator for another."
    )


def _not_for(caller: Caller, path: str) -> Forbidden | None:
    """Why a caller may not have this path, None if they may."""
    if caller.monitor and path not in PUBLIC_PATHS | _WATCHING:
        return Forbidden(f"A key of role 'monitor' is for {' and '.join(sorted(_WATCHING))} alone.")
    if path == METRICS and not (caller.admin or caller.monitor):
        return Forbidden("Metrics are for keys of role 'monitor' or 'admin'.")
    return None


def _bearer_token(scope: Scope) -> str:
    """The token of the Authorization header, "" where there is none."""
    kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""
