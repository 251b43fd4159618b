"""Who wins, what stays, what goes, and what requests see of it."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from proxyserve.engine.caller import Caller
from proxyserve.errors import Forbidden, InvalidRequest, ProxyserveError, SwapConflict, UnknownModel
from proxyserve.experts.audit import read_audit
from proxyserve.experts.generation import Phase
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.fusion.policy import FusionPolicy
from tests.experts.contents import World
from tests.experts.faults import Gate
from tests.experts.kinds import proxy_kind
from tests.experts.swapping import Server, begin, check_answer, evict_standing_by, open_world, wait_until

PROMPT = tuple(range(5, 26))
QA = proxy_kind({"qa": 1.0}, PROMPT)


@pytest.fixture
def gate(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(server, monkeypatch)
    yield gate
    gate.open()


# Two at once ----------------------------------------------------------------------------------------------------------


async def test_of_two_changes_of_one_name_one_wins(server: Server, gate: Gate) -> None:
    begun = await asyncio.gather(
        server.begin_put("qa", "first"), server.begin_put("qa", "second"), return_exceptions=True
    )
    (won,) = [one for one in begun if not isinstance(one, BaseException)]
    (lost,) = [one for one in begun if isinstance(one, BaseException)]
    assert isinstance(lost, SwapConflict) and lost.code == "swap_conflict"
    for change in (server.roll_back("qa"), server.delete("qa")):
        with pytest.raises(SwapConflict):
            await change
    assert server.manager.expert("qa").state == "loading"
    other = await server.begin_put("record", "lora")  # another name may wait its turn
    gate.open()
    assert (await server.manager.settled(won)).generation == won.generation
    assert (await server.manager.settled(other)).state == "published"
    await check_answer(server, QA, won.generation)


@pytest.mark.parametrize("name", ["base", "atlas", "a b", "", "x" * 65, "../qa", "a.tuned", "a+b"])
async def test_names_that_no_expert_can_have(server: Server, name: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await server.put(name, "first")
    assert refusal.value.param == "name"
    assert server.manager.experts() == []


# Rollback -------------------------------------------------------------------------------------------------------------


async def test_rollback_takes_what_is_in_memory(server: Server) -> None:
    await server.put("qa", "first")
    await server.put("qa", "second")
    held = server.generation("qa", 1).loaded
    assert held is not None and server.manager.expert("qa").previous == 1
    before = server.library.shelf.residents.copy()
    status = await server.roll_back("qa")
    assert (status.generation, status.previous) == (1, None)
    assert server.generation("qa", 1).loaded is held
    assert set(server.library.shelf.residents.values()) <= set(before.values())
    await check_answer(server, QA, 1)
    with pytest.raises(SwapConflict) as refusal:
        await server.roll_back("qa")
    assert refusal.value.code == "no_previous_generation"


async def test_rollback_brings_no_old_error_back(server: Server, world: World) -> None:
    await server.put("qa", "first")
    assert (await server.put("qa", world.broken["NaN"])).last_error is not None
    assert (await server.put("qa", "second")).last_error is None
    assert (await server.roll_back("qa")).last_error is None


async def test_rollback_to_a_generation_that_still_drains(server: Server) -> None:
    await server.put("qa", "first")
    running = await begin(server, QA, "old")
    await server.put("qa", "second")
    assert server.generation("qa", 1).phase is Phase.DRAINING
    newer = await begin(server, QA, "new")
    await server.roll_back("qa")
    assert [server.generation("qa", number).phase for number in (1, 2)] == [Phase.PUBLISHED, Phase.DRAINING]
    for answering, number in ((running, 1), (newer, 2)):
        (answer,) = await answering.all()
        assert answer.last is not None and answer.last.fusion is not None
        assert answer.last.fusion.generations == {"qa": number}
    await check_answer(server, QA, 1)
    assert server.generation("qa", 2).phase is Phase.RETIRED


async def test_rollback_loads_again_what_has_left_memory(server: Server) -> None:
    await server.put("qa", "first")
    await server.put("qa", "second")
    await evict_standing_by(server)
    await check_answer(server, QA, 2, "before")
    status = await server.roll_back("qa")
    assert (status.generation, status.state, status.last_error) == (1, "published", None)
    await check_answer(server, QA, 1, "after")


async def test_rollback_to_files_that_have_changed_fails(server: Server, world: World) -> None:
    folder = world.root / "fleeting"
    shutil.copytree(world.contents["first"].folder, folder)
    await server.put("qa", world.spec(folder))
    await server.put("qa", "second")
    await evict_standing_by(server)
    shutil.rmtree(folder)
    shutil.copytree(world.contents["diff"].folder, folder)
    status = await server.roll_back("qa")
    assert (status.generation, status.state, status.previous) == (2, "published", 1)
    failed = next(found for found in status.generations if found.generation == 1)
    assert failed.phase is Phase.FAILED and "have changed since" in (failed.error or "")
    await check_answer(server, QA, 2, "still")
    shutil.rmtree(folder)
    shutil.copytree(world.contents["first"].folder, folder)
    assert (await server.roll_back("qa")).generation == 1  # the right files are back
    shutil.rmtree(folder)


async def test_a_preset_vetoes_a_swap_to_an_expert_without_untuned_model(
    server: Server, world: World
) -> None:
    lone = ExpertSpec(Source(path=str(world.contents["first"].folder)))
    await server.put("qa", lone)
    await server.put("qa", "second")
    server.manager.put_preset("house", {"rule": "proxy", "experts": {"qa": 0.5}}, actor="operator")
    status = await server.put("qa", lone)
    assert (status.generation, status.previous) == (2, 1)
    assert "house" in (status.last_error or "") and "untuned" in (status.last_error or "")
    with pytest.raises(ProxyserveError, match="house"):  # at once, and the same where it must be loaded first
        await server.roll_back("qa")
    assert server.manager.expert("qa").generation == 2
    await check_answer(server, QA, 2)
    await evict_standing_by(server)
    assert (await server.roll_back("qa")).generation == 2
    server.manager.delete_preset("house", actor="operator")
    assert (await server.roll_back("qa")).generation == 1


# Delete ---------------------------------------------------------------------------------------------------------------


async def test_delete_waits_for_those_that_run(server: Server) -> None:
    start = server.holdings()
    await server.put("qa", "first")
    running = await begin(server, QA, "running")
    deleting = asyncio.create_task(server.delete("qa"))
    await wait_until(lambda: server.generation("qa", 1).phase is Phase.DRAINING)
    with pytest.raises(UnknownModel):
        await server.ask(QA, "too-late")
    assert server.manager.expert("qa").state == "draining" and not deleting.done()
    (answer,) = await running.all()
    assert len(answer.tokens) == 200
    assert (await deleting).state == "deleted"
    assert server.manager.experts() == []
    await server.quiet()
    assert server.holdings() == start


async def test_delete_waits_for_those_that_run_on_older_generations_too(server: Server) -> None:
    await server.put("qa", "first")
    running = await begin(server, QA, "running")
    await server.put("qa", "second")
    deleting = asyncio.create_task(server.delete("qa"))
    await wait_until(lambda: server.generation("qa", 2).phase is Phase.RETIRED)
    assert server.manager.expert("qa").state == "draining" and not deleting.done()
    await running.leave()
    assert (await deleting).state == "deleted"


async def test_put_on_a_name_that_still_drains(server: Server) -> None:
    await server.put("qa", "first")
    running = await begin(server, QA, "old")
    deleting = asyncio.create_task(server.delete("qa"))
    await wait_until(lambda: server.generation("qa", 1).phase is Phase.DRAINING)
    status = await server.put("qa", "second")
    assert (status.generation, status.state, status.previous) == (2, "published", None)
    await check_answer(server, QA, 2)
    (answer,) = await running.all()
    assert answer.last is not None and answer.last.fusion is not None
    assert answer.last.fusion.generations == {"qa": 1}
    await deleting
    assert server.generation("qa", 1).phase is Phase.RETIRED
    await check_answer(server, QA, 2, "again")


async def test_numbers_are_not_used_again(server: Server, world: World) -> None:
    await server.put("qa", "first")
    await server.put("qa", world.broken["NaN"])
    await server.delete("qa")
    assert (await server.put("qa", "first")).generation == 3


async def test_an_expert_that_never_served_can_be_deleted(server: Server, world: World) -> None:
    assert (await server.put("qa", world.broken["NaN"])).state == "failed"
    assert (await server.delete("qa")).state == "deleted"
    assert server.manager.experts() == []


async def test_an_expert_that_a_preset_needs_stays(server: Server) -> None:
    await server.put("qa", "first")
    server.manager.put_preset("house", {"experts": {"qa": 0.5}}, actor="operator")
    with pytest.raises(SwapConflict, match="house") as refusal:
        await server.delete("qa")
    assert refusal.value.code == "in_use"
    await check_answer(server, QA, 1)
    server.manager.delete_preset("house", actor="operator")
    await server.delete("qa")


# What requests see ----------------------------------------------------------------------------------------------------


async def test_a_request_keeps_the_generation_that_it_was_prepared_with(server: Server) -> None:
    await server.put("qa", "first")
    with server.plain.offers.lease() as lease:
        status = await server.put("qa", "second")
        assert status.generation == 2
        assert server.generation("qa", 1).phase is Phase.DRAINING  # leased, though nothing runs
        answering = server.stream(QA.submission("old"), lease)
    (answer,) = await answering.all()
    assert answer.last is not None and answer.last.fusion is not None
    assert answer.last.fusion.generations == {"qa": 1}
    assert answer.tokens == server.expected(QA, answer)
    assert server.generation("qa", 1).phase is Phase.STANDBY
    await check_answer(server, QA, 2, "new")


async def test_the_prefix_cache_never_crosses_generations(server: Server) -> None:
    async def cached(request_id: str) -> tuple[int, dict[str, int]]:
        (answer,) = await server.ask(QA, request_id)
        assert answer.last is not None and answer.last.usage is not None
        assert answer.tokens == server.expected(QA, answer)
        return answer.last.usage.cached_tokens, dict(answer.last.usage.lane_tokens)

    await server.put("qa", "first")
    whole = len(PROMPT) + QA.max_tokens - 1
    assert await cached("a") == (0, {"atlas": whole, "qa.tuned": whole, "small": whole})
    _, again = await cached("b")
    assert again["qa.tuned"] == again["small"] < whole
    await server.put("qa", "second")
    _, swapped = await cached("c")
    assert swapped["qa.tuned"] == whole and swapped["small"] < whole
    await server.roll_back("qa")
    _, back = await cached("d")  # it never left, so what it had computed is still right
    assert back["qa.tuned"] == again["qa.tuned"]
    await server.delete("qa")
    await server.put("qa", "first")
    _, anew = await cached("e")
    assert anew["qa.tuned"] == whole


async def test_experts_become_protected_and_no_longer_are(server: Server, world: World) -> None:
    def against() -> None:
        with server.plain.offers.lease() as lease:
            kind = proxy_kind({"qa": -1.0}, PROMPT)
            choices = server.plain.prepare(replace(kind.submission("a"), caller=Caller(admin=False)), lease)
            server.plain.discard(choices)

    spec = world.contents["first"].spec
    await server.put("qa", spec)
    against()
    assert (await server.put("qa", replace(spec, protected=True))).protected
    with pytest.raises(Forbidden, match="protected"):
        against()
    await server.roll_back("qa")
    against()
    assert not server.manager.expert("qa").protected


async def test_the_command_lines_protection_stays(world: World) -> None:
    with open_world(world, policy=FusionPolicy(protected=frozenset())) as server:
        server.manager._roster._policy = FusionPolicy(protected=frozenset({"qa"}))
        await server.put("qa", "first")
        assert server.plain.policy.protected == {"qa"}


# Waiting, closing, names ----------------------------------------------------------------------------------------------


async def test_whoever_stops_waiting_stops_nobody_else(server: Server, gate: Gate) -> None:
    change = await server.begin_put("qa", "first")
    impatient = asyncio.create_task(server.manager.settled(change))
    patient = asyncio.create_task(server.manager.settled(change))
    await asyncio.sleep(0)
    impatient.cancel()
    gate.open()
    assert (await patient).generation == 1
    with pytest.raises(asyncio.CancelledError):
        await impatient
    assert (await server.manager.settled(change)).generation == 1  # also long after


async def test_closing_waits_for_the_load_under_way_and_begins_no_other(world: World, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, open_world(world, state_dir=tmp_path) as server:
        gate = Gate(server, patch)
        await server.begin_put("qa", "first")
        await server.begin_put("record", "second")
        assert await asyncio.to_thread(gate.reached.wait, 20)
        closing = threading.Thread(target=server.manager.close)
        closing.start()
        gate.open()
        await asyncio.to_thread(closing.join, 20)
        assert not closing.is_alive()
        assert {status.name: status.state for status in server.manager.experts()} == {
            "qa": "published",
            "record": "loading",
        }
    with open_world(world, state_dir=tmp_path) as server:
        assert server.states() == {"qa": "published"}
        assert "of expert 'record' was not finished" in server.messages[0]


async def test_a_name_of_a_preset_is_taken(world: World) -> None:
    with open_world(world, presets={"house": "{}"}) as server:
        server.manager.put_preset("own", {}, actor="operator")
        for name in ("house", "own"):
            with pytest.raises(SwapConflict) as refusal:
                await server.put(name, "first")
            assert refusal.value.code == "name_taken"
        await server.put("qa", "first")
        with pytest.raises(SwapConflict) as refusal:
            server.manager.put_preset("qa", {}, actor="operator")
        assert refusal.value.code == "name_taken"


async def test_presets_come_and_go(server: Server) -> None:
    await server.put("qa", "first")
    value = {"rule": "proxy", "experts": {"qa": 0.5}}
    manager = server.manager
    manager.put_preset("house", value, actor="operator")
    assert manager.presets() == {"house": value}
    assert server.plain.catalog.presets.keys() == {"house"}
    for name, wrong in (("a b", {}), ("house", {"experts": {"nobody": 1}}), ("house", {"rule": "none"})):
        with pytest.raises(InvalidRequest):
            manager.put_preset(name, wrong, actor="operator")
    assert manager.presets() == {"house": value}
    manager.delete_preset("house", actor="operator")
    with pytest.raises(UnknownModel):
        manager.delete_preset("house", actor="operator")
    assert manager.presets() == {} and not server.plain.catalog.presets


async def test_every_change_is_in_the_audit_log(server: Server, world: World, tmp_path: Path) -> None:
    await server.put("qa", "first")
    await server.put("qa", world.broken["NaN"])
    await server.put("qa", "second")
    await server.quiet()
    await server.roll_back("qa")
    server.manager.put_preset("house", {}, actor="operator")
    server.manager.delete_preset("house", actor="operator")
    await server.delete("qa")
    server.manager.drain(actor="operator")
    entries = read_audit(tmp_path / "state" / "audit.jsonl")
    finished = [(entry["action"], entry["outcome"], entry.get("generation")) for entry in entries]
    expected = [
        ("put", "done", 1),
        ("put", "failed", 2),
        ("put", "done", 3),
        ("rollback", "done", 1),
        ("put_preset", "done", None),
        ("delete_preset", "done", None),
        ("delete", "done", 1),
        ("drain", "done", None),
    ]
    assert [entry for entry in finished if entry[1] != "begun"] == expected
    assert all(entry["actor"] == "operator" for entry in entries)
    by_generation = {
        entry["generation"]: entry["content_hash"] for entry in entries if "content_hash" in entry
    }
    assert len(by_generation[1]) == 64 and by_generation[1] != by_generation[3]
