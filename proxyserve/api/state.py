"""What the routes of one server share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import HTTPConnection

from proxyserve.api.running import RunningRequests

if TYPE_CHECKING:
    from proxyserve.api.key_ring import Keys
    from proxyserve.api.metrics import Metrics
    from proxyserve.config import ServerConfig
    from proxyserve.engine.loop import AsyncEngine
    from proxyserve.experts.manager import ExpertManager
    from proxyserve.fusion.catalog import Catalog
    from proxyserve.grammar.compiler import GrammarCompiler
    from proxyserve.models.model_set import ModelSet


@dataclass(frozen=True, eq=False)
class ServerState:
    """Made once by `create_app`, found again with `server_state`.

    `grammars` compiles the forms that requests ask for; the server closes it.
    `experts` changes the experts while the server runs, None where they are fixed. `stopping` is set once, when the
    time to drain is over: every answer still in the making then ends in an error.
    """

    engine: AsyncEngine
    config: ServerConfig
    metrics: Metrics
    keys: Keys
    grammars: GrammarCompiler
    experts: ExpertManager | None = None
    running: RunningRequests = field(default_factory=RunningRequests)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def models(self) -> ModelSet:
        return self.engine.engine.models

    @property
    def catalog(self) -> Catalog:
        return self.engine.engine.catalog


def server_state(connection: HTTPConnection) -> ServerState:
    """The state of the server that `connection` came to; also a FastAPI dependency."""
    state: ServerState = connection.app.state.proxyserve
    return state
