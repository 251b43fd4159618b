"""One server over tiny models for the tests of a file; each test must leave it idle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxyserve.api.server import listen
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.models.model_set import ModelSet
from tests.api.live import Live, assert_idle, serve


@pytest.fixture(scope="module")
def shared_live(tiny_models: ModelSet) -> Iterator[Live]:
    engine = AsyncEngine(
        Engine(tiny_models, EngineConfig(max_batch=8, max_batch_tokens=64, kv_memory=4 * 2**20))
    )
    engine.start()
    with serve(engine) as live:
        yield live
    engine.close()


@pytest.fixture
def live(shared_live: Live) -> Iterator[Live]:
    yield shared_live
    assert_idle(shared_live.engine)


@pytest.fixture
def free_port() -> int:
    """A port that was free a moment ago."""
    with listen("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])
