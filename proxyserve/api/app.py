"""The application: routes, layers around them, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from proxyserve import __version__
from proxyserve.api import (
    admin,
    chat,
    completions,
    health,
    metrics,
    models,
    requests,
    responses,
    score,
    tokenize,
    tokenizer_info,
)
from proxyserve.api.auth import PUBLIC_PATHS, AuthMiddleware
from proxyserve.api.documentation import install_openapi
from proxyserve.api.errors import install_error_handlers
from proxyserve.api.key_ring import Keys
from proxyserve.api.limits import BodyLimitMiddleware
from proxyserve.api.metrics import Metrics
from proxyserve.api.playground import install_playground, playground_files
from proxyserve.api.ports import PortMiddleware
from proxyserve.api.rate_headers import RATE_HEADERS, RateHeadersMiddleware
from proxyserve.api.request_id import RequestIdMiddleware
from proxyserve.api.schemas.chat import ChatChunk
from proxyserve.api.schemas.response_events import ResponseStreamEvent
from proxyserve.api.state import ServerState
from proxyserve.api.telemetry import Tracing
from proxyserve.api.web_pages import WebPagesMiddleware
from proxyserve.config import ServerConfig
from proxyserve.grammar.compiler import GrammarCompiler

if TYPE_CHECKING:
    from proxyserve.engine.loop import AsyncEngine
    from proxyserve.experts.manager import ExpertManager

_DESCRIPTION = """\
An inference server that steers a large frozen language model with small tuned ones while it decodes. The routes are
OpenAI's; the `fusion` object, or a model name such as `BASE+EXPERT:0.8`, says which experts take part and how much.
"""


def create_app(
    engine: AsyncEngine,
    config: ServerConfig,
    experts: ExpertManager | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """An ASGI application over `engine`, which the caller starts and closes, as it does `tracing`. The control plane is
    there if `experts` is.

    Raises StartupError if a key file is unusable. Does not check which address it is served at; `run_server` does.
    """
    keys = Keys.of(config)
    base = engine.engine.models.base
    measured = Metrics(engine.snapshot, experts)
    grammars = GrammarCompiler(base.tokenizer, base.eos_ids, config.limits.grammar, observe=measured.grammar)
    state = ServerState(engine, config, measured, keys, grammars, experts)
    app = FastAPI(
        title="proxyserve",
        version=__version__,
        description=_DESCRIPTION,
        # FastAPI's own pages fetch their scripts from another host; `install_openapi` has one that needs none.
        docs_url=None,
        openapi_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.proxyserve = state
    for module in (
        chat,
        completions,
        responses,
        score,
        models,
        tokenize,
        tokenizer_info,
        requests,
        health,
        metrics,
    ):
        app.include_router(module.router)
    if experts is not None:
        app.include_router(admin.router)
    public = PUBLIC_PATHS
    if config.playground:
        install_playground(app)
        public |= playground_files().keys()
    install_error_handlers(app)
    install_openapi(app, chunks=(ChatChunk, ResponseStreamEvent), keys=keys.required)
    # The last one added is the outermost.
    if config.admin_port is not None:
        app.add_middleware(PortMiddleware, admin_port=config.admin_port)
    app.add_middleware(
        BodyLimitMiddleware,
        max_bytes=config.limits.max_body_bytes,
        seconds=config.limits.body_seconds,
        metrics=state.metrics,
    )
    app.add_middleware(RateHeadersMiddleware, rates=engine.rates)
    app.add_middleware(AuthMiddleware, keys=keys, metrics=state.metrics, public=public)
    if not keys.required:
        app.add_middleware(WebPagesMiddleware, metrics=state.metrics, origins=config.cors_origins)
    if config.cors_origins:
        # Outside of the keys: a browser asks without one whether a page may send it.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],  # OpenAI's browser client sends a dozen of its own
            expose_headers=["x-request-id", "retry-after", *RATE_HEADERS],
        )
    app.add_middleware(RequestIdMiddleware, tracing=tracing)
    return app
