"""The application: routes, layers around them, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from proxyserve import __version__
from proxyserve.api import admin, chat, completions, health, metrics, models, score, tokenize, tokenizer_info
from proxyserve.api.auth import AuthMiddleware, KeyRing
from proxyserve.api.documentation import install_openapi
from proxyserve.api.errors import install_error_handlers
from proxyserve.api.limits import BodyLimitMiddleware
from proxyserve.api.metrics import Metrics
from proxyserve.api.ports import PortMiddleware
from proxyserve.api.request_id import RequestIdMiddleware
from proxyserve.api.schemas.chat import ChatChunk
from proxyserve.api.state import ServerState
from proxyserve.api.telemetry import Tracing
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
    keys, admin_keys = KeyRing.load(config.api_key_file), KeyRing.load(config.admin_key_file)
    base = engine.engine.models.base
    grammars = GrammarCompiler(base.tokenizer, base.eos_ids, config.limits.grammar)
    state = ServerState(engine, config, Metrics(engine.snapshot, experts), grammars, experts)
    app = FastAPI(
        title="proxyserve",
        version=__version__,
        description=_DESCRIPTION,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    app.state.proxyserve = state
    for module in (chat, completions, score, models, tokenize, tokenizer_info, health, metrics):
        app.include_router(module.router)
    if experts is not None:
        app.include_router(admin.router)
    install_error_handlers(app)
    install_openapi(app, chunks=(ChatChunk,), keys=bool(keys or admin_keys))
    # The last one added is the outermost.
    if config.admin_port is not None:
        app.add_middleware(PortMiddleware, admin_port=config.admin_port)
    app.add_middleware(BodyLimitMiddleware, max_bytes=config.limits.max_body_bytes, metrics=state.metrics)
    app.add_middleware(AuthMiddleware, keys=keys, admin_keys=admin_keys, metrics=state.metrics)
    app.add_middleware(RequestIdMiddleware, tracing=tracing)
    return app
