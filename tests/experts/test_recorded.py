"""Experts that come and go bring their recorded steps and take them along."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.pretend_graphs import PretendGraphDevice
from tests.experts.contents import World
from tests.experts.kinds import proxy_kind
from tests.experts.swapping import Server, begin, check_answer, evict_standing_by, open_world

PROMPT = tuple(range(5, 26))
QA = proxy_kind({"qa": 1.0}, PROMPT)
RECORD = proxy_kind({"record": 1.0}, PROMPT)


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxyserve.engine.cuda.step_graphs.MOST_TOKENS", 4)


def recorded(server: Server) -> set[str]:
    """The models whose steps are recorded."""
    return {str(r.model.key) for r in server.plain.residents.local if r.graphs is not None}


async def test_a_swap_replaces_recordings_between_two_steps(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made beside steps, before the expert is published; answers are those of plain steps, before, during
    and after the swap. Adapters run as they are, over a model that is recorded."""
    device = PretendGraphDevice()
    monkeypatch.setattr("proxyserve.engine.engine.graph_device_for", lambda _: device)
    with open_world(world, state_dir=tmp_path / "state", max_batch=4, pairs="apart") as server:
        graphs = server.plain.graphs
        assert graphs is not None
        alone = len(graphs)
        assert recorded(server) == {"atlas@1"}
        await server.put("qa", "first")
        assert recorded(server) == {"atlas@1", "qa.tuned@1", "small@1"}
        assert len(graphs) == 4 * alone  # three models, and all of them together
        running = await begin(server, QA, "running")
        await server.put("qa", "second")
        await server.put("record", "lora")
        before = sum(device.replays)
        await check_answer(server, QA, 2)
        await check_answer(server, RECORD, 1, "record")
        assert sum(device.replays) > before
        (answer,) = await running.all()
        expected = server.expected(QA, answer)
        assert len(expected) < len(answer.tokens) and answer.tokens[: len(expected)] == expected
        await evict_standing_by(server)
        assert recorded(server) == {"atlas@1", "qa.tuned@2", "small@1"}
        await server.delete("qa")
        await server.delete("record")
        await server.quiet()
        assert recorded(server) == {"atlas@1"}
        assert len(graphs) == alone


async def test_a_load_that_fails_leaves_no_recordings(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After they were made, before any step could run them."""
    monkeypatch.setattr("proxyserve.engine.engine.graph_device_for", lambda _: PretendGraphDevice())
    with open_world(world, state_dir=tmp_path / "state", max_batch=4, pairs="apart") as server:
        graphs = server.plain.graphs
        assert graphs is not None
        alone = len(graphs)

        def fail(*_: object) -> None:
            raise RuntimeError("no step will run this")

        monkeypatch.setattr(server.plain, "adopt", fail)
        await server.put("qa", "first")
        assert recorded(server) == {"atlas@1"}
        assert graphs.recorded == 4 * alone
        assert len(graphs) == alone
