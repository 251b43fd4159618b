"""What a server says of itself when it starts."""

from __future__ import annotations

import io

from rich.console import Console

from proxyserve.api.key_ring import KeyRing
from proxyserve.cli.settings import ExpertSettings
from proxyserve.cli.startup import startup_table
from proxyserve.config import EngineConfig, ServerConfig
from proxyserve.engine.engine import Engine
from proxyserve.models.model_set import ModelSet
from tests.engine.pretend_graphs import PretendGraphDevice


def shown(engine: Engine) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(startup_table(engine, ServerConfig(), ExpertSettings(), KeyRing(), computing="float32"))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_recorded_steps(tiny_models: ModelSet) -> None:
    """How many there are, of how many tokens, and what attends; nothing of it where nothing is recorded."""
    config = EngineConfig(max_batch=4, max_batch_tokens=32, kv_memory=2**20, speculate="off")
    recorded = Engine(tiny_models, config, graph_device=PretendGraphDevice())
    text = shown(recorded)
    count = 3 * (len(tiny_models.trunks) + len(tiny_models.experts))
    assert f"{count} decoding steps recorded, of at most 4 tokens (--no-cuda-graphs)" in text
    assert "attention by gather" in text
    assert "recorded" not in shown(Engine(tiny_models, config))


def test_recorded_steps_have_room_for_the_drafts_there_are(tiny_models: ModelSet) -> None:
    config = EngineConfig(max_batch=2, max_batch_tokens=32, kv_memory=2**20, speculate=1)
    engine = Engine(tiny_models, config, graph_device=PretendGraphDevice())
    assert engine.graphs is not None and engine.graphs.sizes[-1] == 4
    assert "drafts of 1 tokens, whether they pay or not" in shown(engine)
