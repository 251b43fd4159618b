"""The playground: a page that is served at `/`, its files under `/playground/`, and what they must know of the server.

The files are those of the folder `proxyserve/playground`; they hold no data, and need no key. Nothing is built, and no
other host is asked for anything, which the page's policy enforces.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field, TypeAdapter
from starlette.routing import Match, Route
from starlette.types import Scope

from proxyserve import __version__
from proxyserve.api.schemas.rule_models import AnyFusion
from proxyserve.api.state import server_state
from proxyserve.api.tokenizer_info import own_template
from proxyserve.engine.caller import Caller
from proxyserve.fusion.permission import may_use
from proxyserve.fusion.policy import FusionPolicy

PAGE = "/"
FOLDER = "/playground/"
SETTINGS = f"{FOLDER}settings"

#: Scripts, styles and requests of this origin alone: text that a model wrote can neither run nor call anybody.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)

_HEADERS = {
    # Names do not change with their content, so that browsers ask each time, and mostly get a 304.
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_MEDIA_TYPES = {".js": "text/javascript; charset=utf-8", ".html": "text/html; charset=utf-8"}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file as it is sent: its bytes, the same packed by gzip, and a tag of its content."""

    content: bytes
    packed: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, name: str, content: bytes) -> StaticFile:
        suffix = f".{name.rpartition('.')[2]}"
        kind = _MEDIA_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "text/plain"
        kind = f"{kind}; charset=utf-8" if kind in ("text/css", "text/plain", "text/markdown") else kind
        return cls(content, gzip.compress(content, mtime=0), kind, hashlib.sha256(content).hexdigest()[:32])

    def respond(self, request: Request) -> Response:
        """The file, or a 304 to who has it. The tag of the packed bytes is another one, as they are other bytes."""
        packed = "gzip" in request.headers.get("accept-encoding", "")
        etag = f'"{self.etag}{"-gzip" if packed else ""}"'
        headers = {**_HEADERS, "ETag": etag}
        if self.media_type.startswith("text/html"):
            headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        known = request.headers.get("if-none-match", "")
        if known == "*" or etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        if packed:
            headers["Content-Encoding"] = "gzip"
        return Response(self.packed if packed else self.content, 200, headers, self.media_type)


@cache
def playground_files() -> Mapping[str, StaticFile]:
    """What is served, by path. There is nothing else under these paths, whatever a request names."""
    found: dict[str, StaticFile] = {}

    def walk(folder: Traversable, path: str) -> None:
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if entry.is_dir():
                walk(entry, f"{path}{entry.name}/")
            else:
                where = PAGE if f"{path}{entry.name}" == f"{FOLDER}index.html" else f"{path}{entry.name}"
                found[where] = StaticFile.of(entry.name, entry.read_bytes())

    walk(files("proxyserve").joinpath("playground"), FOLDER)
    return MappingProxyType(found)


class FileRoute(Route):
    """Sends one file. Says in the scope which route it is, as FastAPI's routes do: the log goes by it."""

    def __init__(self, path: str, file: StaticFile) -> None:
        async def send(request: Request) -> Response:
            return file.respond(request)

        super().__init__(path, send, methods=["GET"], include_in_schema=False)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, "route": self} if match is not Match.NONE else found


def install_playground(app: FastAPI) -> None:
    """Add routes of all files, and of the page's settings."""
    app.router.routes.extend(FileRoute(path, file) for path, file in playground_files().items())
    app.add_api_route(SETTINGS, read_settings, include_in_schema=False)


class OfferedExpert(BaseModel):
    name: str
    untuned: bool = Field(
        description="Whether it has an untuned model; without one only some rules can use it."
    )


class PlaygroundSettings(BaseModel):
    """What the page must know to offer this key nothing that it would be refused."""

    version: str
    base: str
    experts: list[OfferedExpert]
    presets: list[str]
    min_weight: float
    max_weight: float
    max_model_len: int
    explain: int = Field(description="Most tokens that an explanation may list; 0 if this key may have none.")
    keys: bool = Field(description="Whether the server has keys.")
    admin: bool
    control_plane: Literal["here", "elsewhere", "none"] = Field(
        description="Whether experts can be changed through the port that was asked, another one, or not at all."
    )
    admin_port: int | None
    chats: bool = Field(
        description="Whether the base can chat without an expert whose chat template it borrows."
    )
    generates: bool = Field(description="Whether this port takes requests that run models.")
    fusion: dict[str, Any] = Field(
        description="JSON schema of the fusion object, as the OpenAPI document has it."
    )


async def read_settings(request: Request) -> PlaygroundSettings:
    """Of the key that asks. No part of the API: it changes with the page."""
    state = server_state(request)
    caller: Caller = request.state.caller
    offer = state.engine.engine.offers.current  # once: another one may be there at any time
    catalog, policy = offer.catalog, offer.policy
    models = catalog.models
    experts = {name: expert.untuned is not None for name, expert in models.experts.items()}
    experts |= {name: parked.untuned is not None for name, parked in models.parked.items()}
    admin_port = state.config.admin_port
    on_admin_port = admin_port is not None and request.scope["server"][1] == admin_port
    if state.experts is None:
        control_plane: Literal["here", "elsewhere", "none"] = "none"
    else:
        control_plane = "here" if admin_port is None or on_admin_port else "elsewhere"
    return PlaygroundSettings(
        version=__version__,
        base=models.base.name,
        experts=[
            OfferedExpert(name=name, untuned=untuned)
            for name, untuned in sorted(experts.items())
            if caller.may_use(name)
        ],
        presets=[
            name for name, fusion in catalog.presets.items() if may_use(fusion, catalog, caller.experts)
        ],
        min_weight=policy.min_weight,
        max_weight=policy.max_weight,
        max_model_len=models.base.context_length,
        explain=_most_explained(caller, policy),
        keys=state.keys.required,
        admin=caller.admin,
        control_plane=control_plane,
        admin_port=admin_port,
        chats=(own_template(models.base.tokenizer) or state.config.chat.template) is not None,
        generates=not on_admin_port,
        fusion=_fusion_schema(),
    )


@cache
def _fusion_schema() -> dict[str, Any]:
    """Its forms are made from this. The whole document takes seconds to make, in which no stream would go on."""
    return TypeAdapter(AnyFusion).json_schema()


def _most_explained(caller: Caller, policy: FusionPolicy) -> int:
    if caller.explain is False or not (caller.explain or caller.admin or policy.explain_to_all):
        return 0
    most = caller.limits.logprobs
    return policy.max_explain if most is None else min(most, policy.max_explain)
