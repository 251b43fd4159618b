"""The load generator asks our own server: every answer comes, is counted twice in the same way, and was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from proxyserve.bench.load.drive import Load
from proxyserve.bench.load.run import LoadSettings, measure, run_load
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.models.model_set import ModelSet
from tests.api.live import Live, assert_idle, serve
from tests.bench.load import target, workload
from tests.tiny import TinyFamily


@pytest.fixture(scope="module")
def shared_live(tiny_models: ModelSet) -> Iterator[Live]:
    config = EngineConfig(max_batch=8, max_batch_tokens=64, kv_memory=4 * 2**20)
    engine = AsyncEngine(Engine(tiny_models, config))
    engine.start()
    with serve(engine) as live:
        yield live
    engine.close()


@pytest.fixture
def live(shared_live: Live) -> Iterator[Live]:
    yield shared_live
    assert_idle(shared_live.engine)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("kind", ["ids", "texts", "chat"])
@pytest.mark.parametrize("load", [Load(6, clients=3), Load(6, rate=200.0)], ids=str)
def test_every_answer_is_there(
    live: Live, tiny_family: TinyFamily, load: Load, kind: str, stream: bool
) -> None:
    chat = kind == "chat"
    asked = workload(
        tiny_family.base if not chat else tiny_family.experts["qa"],
        prompt="3-9",
        output="2-6",
        as_text=kind != "ids",
        models={"atlas+qa": 1.0} if chat else {"atlas": 1.0, "atlas+qa:0.5": 2.0},
    )
    to = target(live.url + "/v1", chat=chat, stream=stream, extra={"return_token_ids": True})
    found = measure(to, asked, load)
    assert found.failures == ()
    # As long as asked for, `usage` as many as the ids, and prompts counted as they were sent.
    assert [answer.doubts for answer in found.answers] == [()] * 6
    expected = [asked.ask(number) for number in range(6)]
    assert [answer.tokens for answer in found.answers] == [ask.max_tokens for ask in expected]
    assert [answer.model for answer in found.answers] == [ask.model for ask in expected]
    assert found.tokens == sum(ask.max_tokens for ask in expected)
    for answer in found.answers:
        assert answer.usage == answer.ids is not None
        assert (len(answer.pieces) > 1) == (stream and answer.tokens > 1)
        assert answer.began <= answer.pieces[0] <= answer.pieces[-1] <= answer.ended
    assert len(found.late) == (6 if load.rate else 0)
    assert found.seconds > 0.0 and found.cpu > 0.0


def test_models_are_asked_by_their_shares(tiny_family: TinyFamily) -> None:
    asked = workload(tiny_family.base, models={"atlas": 3.0, "qa": 1.0})
    counts = Counter(asked.ask(number).model for number in range(2000))
    assert counts["atlas"] / 2000 == pytest.approx(0.75, abs=0.03)


def test_a_request_is_the_same_in_every_run_and_no_two_are_alike(tiny_family: TinyFamily) -> None:
    """Else the server's prefix cache would answer for the server."""
    first, again = (workload(tiny_family.base, prompt="16-32") for _ in range(2))
    asks = [first.ask(number) for number in range(100)]
    assert asks == [again.ask(number) for number in range(100)]
    assert len({tuple(ask.prompt[:8]) for ask in asks}) == 100


def test_no_request_is_asked_twice(live: Live, tiny_family: TinyFamily) -> None:
    """Neither by two rounds, nor by two loads, nor after the warm-up."""
    asked = workload(tiny_family.base, prompt="20", output="1")
    loads = [Load(3, clients=1), Load(5, clients=2), Load(4, rate=500.0)]
    before = sum(live.engine.snapshot().prefix_hits.values())
    result = run_load(LoadSettings(target(live.url), asked, loads, rounds=2, warmup=2))
    assert [summary.answered for summary in result.summaries] == [6, 10, 8]
    assert sum(live.engine.snapshot().prefix_hits.values()) == before


def test_what_the_server_refuses_is_said(live: Live, tiny_family: TinyFamily) -> None:
    asked = workload(tiny_family.base, models={"nobody": 1.0})
    found = measure(target(live.url), asked, Load(2, clients=1))
    assert found.answers == ()
    assert [failure.kind for failure in found.failures] == ["status 404"] * 2
    assert "nobody" in found.failures[0].message
