"""API keys. Every route needs one but those in `PUBLIC_PATHS`; without a key file nobody needs one and the server
listens on loopback addresses only (`server.check_binding`)."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from proxyserve.api.errors import StartupError, Unauthorized, error_response, problem_of
from proxyserve.api.metrics import Metrics
from proxyserve.engine.caller import Caller

#: The routes that anyone may call. A test walks all other routes and shows that they refuse.
PUBLIC_PATHS = frozenset({"/health", "/ready", "/version"})

_SHA256 = re.compile(r"sha256:([0-9a-fA-F]{64})")


class KeyRing:
    """The SHA-256 digests of the keys that this server accepts; the keys themselves are not kept."""

    def __init__(self, digests: Iterable[bytes] = ()) -> None:
        self._digests = tuple(dict.fromkeys(digests))

    @classmethod
    def load(cls, path: Path | None) -> KeyRing:
        """Read a key file: one key per line, in plain or as `sha256:HEX`; blank lines and lines that begin with `#` do
        not count. None gives a ring without keys. Raises StartupError for a file without keys or with a bad line."""
        if path is None:
            return cls()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"The key file {path} cannot be read: {error}") from error
        digests = [
            _digest_of_line(line.strip(), f"{path}:{number}")
            for number, line in enumerate(lines, 1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        if not digests:
            raise StartupError(
                f"The key file {path} has no keys; add one per line, or start without a key file."
            )
        return cls(digests)

    def __len__(self) -> int:
        return len(self._digests)

    def match(self, key: str) -> bytes | None:
        """The digest of `key` if this ring has it. The time taken does not tell which key came near."""
        presented = hashlib.sha256(key.encode()).digest()
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(presented, digest)
        return presented if found else None


class AuthMiddleware:
    """Refuses requests without a known key, before their body is read. Sets `state.salt`, which keeps the prefix-cache
    entries of different keys apart, and `state.caller`: on whose behalf the request is. Without any keys, whoever can
    connect is the operator."""

    def __init__(self, app: ASGIApp, keys: KeyRing, admin_keys: KeyRing, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan; there are no websocket routes
            await self._app(scope, receive, send)
            return
        salt, admin = "", not (self._keys or self._admin_keys)
        if not admin and scope["path"] not in PUBLIC_PATHS:
            token = _bearer_token(scope)
            of_admin = self._admin_keys.match(token)
            digest = of_admin or self._keys.match(token)
            admin = of_admin is not None
            if digest is None:
                self._metrics.rejected("unauthorized")
                refusal = Unauthorized(
                    "This server needs a key: send 'Authorization: Bearer KEY' with a known one."
                )
                await error_response(problem_of(refusal))(scope, receive, send)
                return
            salt = hashlib.sha256(b"prefix-cache" + digest).hexdigest()
        scope.setdefault("state", {}).update(salt=salt, caller=Caller(admin=admin))
        await self._app(scope, receive, send)


def _bearer_token(scope: Scope) -> str:
    """The token of the Authorization header, "" where there is none."""
    kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _digest_of_line(line: str, where: str) -> bytes:
    if line.startswith("sha256:"):
        match = _SHA256.fullmatch(line)
        if match is None:
            raise StartupError(f"{where}: 'sha256:' must be followed by 64 hexadecimal digits.")
        return bytes.fromhex(match[1])
    if not line.isascii() or not line.isprintable() or " " in line:
        raise StartupError(f"{where}: a key is one word of ASCII characters; give one key per line.")
    return hashlib.sha256(line.encode()).digest()
