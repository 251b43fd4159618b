"""Experts whose weights are on disk only, to make room for others: parked, woken, swapped, deleted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxyserve.errors import ExpertParked, NoRoom, NotReady, SwapConflict, UnknownModel
from proxyserve.experts.generation import Phase
from proxyserve.experts.room import MemoryPolicy
from proxyserve.types import ModelKey
from tests.experts.contents import World
from tests.experts.faults import Faults, Gate
from tests.experts.kinds import Kind, proxy_kind
from tests.experts.swapping import Server, begin, check_answer, open_world, wait_until

PROMPT = tuple(range(5, 26))
QA = proxy_kind({"qa": 1.0}, PROMPT)
RECORD = proxy_kind({"record": 1.0}, PROMPT)
RECORD_KEY = ModelKey("record.tuned", 1)
BIO = proxy_kind({"bio": 1.0}, PROMPT)
KINDS = {"qa": QA, "record": RECORD, "bio": BIO}


@pytest.fixture
def small(world: World, tmp_path: Path) -> Iterator[Server]:
    """A server with room for two experts, which parks idle ones. Make them with `fill`."""
    with open_world(world, state_dir=tmp_path / "state", evict_idle=True) as server:
        yield server


async def fill(server: Server) -> None:
    """qa and record in memory, used in this order, and no room for a third."""
    await server.put("qa", "first")
    await server.put("record", "second")
    for name in ("record", "qa", "record"):
        await server.ask(KINDS[name], f"fill-{name}-{server.plain.counters.steps}")
    await wait_until(server.idle)
    server.manager._room.policy = MemoryPolicy(server.plain.residents.bytes, evict_idle=True)


async def ask_waking(server: Server, kind: Kind, request_id: str, patience: float = 20.0) -> None:
    """As the HTTP layer asks: what is parked is loaded first. Compares the answer with the reference."""
    while True:
        try:
            (answer,) = await server.ask(kind, request_id)
        except ExpertParked as parked:
            await server.manager.wake(parked.name, patience)
            continue
        assert answer.tokens == server.expected(kind, answer)
        return


async def test_the_least_recently_used_expert_is_parked_and_woken(small: Server) -> None:
    await fill(small)
    await small.put("bio", "diff")
    assert small.states() == {"qa": "parked", "record": "published", "bio": "published"}
    qa = small.manager.expert("qa").generations[0]
    assert (qa.phase, qa.bytes) == (Phase.PARKED, 0)
    assert small.plain.residents.bytes <= small.manager._room.policy.limit
    with pytest.raises(ExpertParked):
        await small.ask(QA, "parked")
    await ask_waking(small, BIO, "bio")
    await ask_waking(small, QA, "qa")
    assert small.states() == {"qa": "published", "record": "parked", "bio": "published"}
    await check_answer(small, QA, 1)
    counters = small.manager.counters
    assert (counters.wakes, counters.evictions) == (1, 2)


async def test_an_expert_in_use_is_not_parked(small: Server) -> None:
    await fill(small)
    running = [await begin(small, kind, f"running-{name}") for name, kind in list(KINDS.items())[:2]]
    with pytest.raises(NoRoom):
        await small.put("bio", "diff")
    await running[1].leave()
    await wait_until(lambda: small.plain.offers.held(RECORD_KEY) == 0)
    await small.put("bio", "diff")
    assert small.states() == {"qa": "published", "record": "parked", "bio": "published"}
    await running[0].leave()


async def test_parking_waits_for_requests_that_are_being_prepared(small: Server) -> None:
    await fill(small)
    with small.plain.offers.lease() as lease:
        change = await small.begin_put("bio", "diff")
        await wait_until(lambda: small.generation("qa", 1).phase is Phase.PARKED)
        assert small.generation("qa", 1).loaded is not None
        answering = small.stream(QA.submission("prepared"), lease)
    (answer,) = await answering.all()
    assert answer.tokens == small.expected(QA, answer)
    assert (await small.manager.settled(change)).state == "published"
    assert small.generation("qa", 1).loaded is None
    await ask_waking(small, QA, "woken")


async def test_an_expert_that_is_wanted_again_before_its_weights_have_gone(
    small: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxyserve.experts.room._PATIENCE_SECONDS", 0.01)
    await fill(small)
    loaded = small.generation("qa", 1).loaded
    with small.plain.offers.lease():
        status = await small.put("bio", "diff")
        assert status.state == "failed" and "are left" in (status.last_error or "")
        assert small.states()["qa"] == "parked"
        await ask_waking(small, QA, "woken")
        assert small.generation("qa", 1).loaded is loaded
    assert (await small.put("bio", "diff")).state == "published"


async def test_rollback_to_a_generation_that_was_parked_and_has_not_gone(
    small: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxyserve.experts.room._PATIENCE_SECONDS", 0.01)
    await small.put("qa", "lora")
    await fill(small)
    with small.plain.offers.lease():
        await small.put("bio", "diff")
        assert small.states()["qa"] == "parked" and small.generation("qa", 2).loaded is not None
        small.manager._room.policy = MemoryPolicy(2**40)
        assert (await small.put("qa", "merge")).previous == 2
        with pytest.raises(SwapConflict):
            await small.roll_back("qa")
        assert small.manager.expert("qa").generation == 3
    await wait_until(lambda: small.generation("qa", 2).loaded is None)
    assert (await small.roll_back("qa")).generation == 2
    await check_answer(small, QA, 2)


async def test_many_requests_wake_an_expert_once(small: Server) -> None:
    await fill(small)
    await small.put("bio", "diff")
    await asyncio.gather(*(ask_waking(small, QA, f"r{number}") for number in range(6)))
    assert small.manager.counters.wakes == 1


async def test_waking_ends_in_time(small: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(small)
    await small.put("bio", "diff")
    gate = Gate(small, monkeypatch)
    with pytest.raises(NotReady, match="still being loaded"):
        await small.manager.wake("qa", 0.01)
    with pytest.raises(NotReady, match="still being loaded"):
        await small.manager.wake("qa", -1.0)
    gate.open()
    await small.manager.wake("qa", 20.0)  # the load went on
    await check_answer(small, QA, 1)
    assert small.manager.counters.wakes == 1


async def test_waking_fails_and_succeeds_later(small: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(small)
    await small.put("bio", "diff")
    faults = Faults(small, monkeypatch)
    for point in ("read", "verify", "warm", "adopt", "adopt halfway", "room"):
        before = small.holdings()
        faults.arm(point, "qa")
        with pytest.raises(NotReady, match="cannot be loaded"):
            await small.manager.wake("qa", 20.0)
        assert small.states()["qa"] == "parked"
        await small.quiet()
        # Somebody may have made way in vain.
        assert all(count <= before[name] for name, count in small.holdings().items()), point
    await ask_waking(small, QA, "qa")
    assert small.manager.expert("qa").last_error is None


async def test_a_swap_of_a_parked_expert_that_a_request_wakes(
    small: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new generation is under way when the request comes; the old one need not be loaded any more."""
    await fill(small)
    await small.put("bio", "diff")
    gate = Gate(small, monkeypatch)
    change = await small.begin_put("qa", "merge")
    asking = asyncio.create_task(ask_waking(small, QA, "waking"))
    await wait_until(lambda: small.manager.counters.wakes or asking.done())
    gate.open()
    status = await small.manager.settled(change)
    assert (status.generation, status.state, status.last_error) == (2, "published", None)
    await asking
    await check_answer(small, QA, 2)
    await wait_until(small.idle)
    assert small.manager.counters.failures == {}


async def test_a_swap_of_a_parked_expert_and_back(small: Server) -> None:
    await fill(small)
    await small.put("bio", "diff")
    status = await small.put("qa", "merge")
    assert (status.generation, status.previous) == (2, 1)
    assert small.generation("qa", 1).phase is Phase.RETIRED
    assert (await small.roll_back("qa")).generation == 1
    await check_answer(small, QA, 1)


async def test_a_parked_expert_can_be_deleted(small: Server) -> None:
    await fill(small)
    await small.put("bio", "diff")
    assert (await small.delete("qa")).state == "deleted"
    with pytest.raises(UnknownModel):
        await small.ask(QA, "gone")
    await small.manager.wake("qa", 1.0)  # somebody who came a moment before: nothing to wait for


async def test_the_limit_holds_with_kv_memory_of_its_own(world: World) -> None:
    """The first small model brings an arena with it, which takes what is left beside the weights and no more."""
    with open_world(world) as server:
        room = server.manager._room
        recipe_bytes = 2 * sum(file.stat().st_size for file in world.family.untuned.glob("*.safetensors"))
        limit = server.plain.residents.bytes + recipe_bytes + 2**17
        room.policy = MemoryPolicy(limit)
        status = await server.put("qa", "first")
        assert status.state == "published", status.last_error
        assert server.plain.residents.bytes <= limit
        await check_answer(server, QA, 1)
