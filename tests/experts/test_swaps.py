"""Swaps under load and under failure: no request fails, none mixes generations, everything comes back."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from proxyserve.api.presets import parse_fusion
from proxyserve.errors import ExpertParked, LoadError, SwapConflict, UnknownModel
from proxyserve.experts.room import MemoryPolicy
from proxyserve.experts.store import StateError
from proxyserve.types import FinishReason
from tests.experts.contents import World
from tests.experts.faults import Faults
from tests.experts.kinds import Kind, arm_kind, base_kind, dynamic_kind, proxy_kind
from tests.experts.swapping import Answering, Server, open_world

STREAMS = 16
#: Swaps and rollbacks that must have succeeded, beside those that failed. For a longer run set the variable.
SWAPS = int(os.environ.get("PROXYSERVE_SWAPS", "50"))
WARM_UP = SWAPS // 5

PROMPTS = ((5, 17, 200, 33, 9, 120), (7,), (300, 12, 77, 77, 140, 9, 1, 350, 211), (88, 301, 2, 45, 6))
#: The experts that are always there; "guest" comes and goes.
HOSTS = {"qa": "first", "record": "lora", "bio": "compressed"}
KINDS = (
    base_kind(PROMPTS[0]),
    base_kind(PROMPTS[1], n=2, seed=5),
    proxy_kind({"qa": 1.0}, PROMPTS[0]),
    proxy_kind({"record": -0.7}, PROMPTS[1], seed=1),
    proxy_kind({"bio": 0.6}, PROMPTS[2], n=3, seed=2),
    proxy_kind({"qa": 0.35, "record": 1.6}, PROMPTS[3]),
    proxy_kind({"record": 1.0, "bio": 0.5}, PROMPTS[2], seed=3, n=2),
    proxy_kind({"guest": 1.2}, PROMPTS[3]),
    proxy_kind({"qa": 0.0, "bio": 1.0}, PROMPTS[0]),
    arm_kind({"record": 0.8}, PROMPTS[0]),
    arm_kind({"bio": 0.5, "guest": 0.2}, PROMPTS[2]),
    dynamic_kind("qa", PROMPTS[3]),
    dynamic_kind("record", PROMPTS[0], seed=4),
)
#: What presets may be.
PRESETS = (proxy_kind({"qa": 0.9}, PROMPTS[2]), arm_kind({"bio": 1.0}, PROMPTS[3], seed=6))


#: What was asked, the number of the choice, which content each expert was, and the tokens.
Answer = tuple[Kind, int, tuple[tuple[str, str], ...], tuple[int, ...]]


@dataclass
class Load:
    """Streams that never end, each one request after the other. `answers` counts what they got."""

    server: Server
    kinds: Sequence[Kind] = KINDS
    answers: Counter[Answer] = field(default_factory=Counter)
    cancelled: int = 0
    refused: int = 0
    _number: int = 0
    _stop: bool = False

    async def run(self, seed: int) -> None:
        random = Random(seed)
        while not self._stop:
            self._number += 1
            kind, submission = self._choose(random, f"r{self._number}")
            try:
                answering = await self._submit(submission, random)
            except UnknownModel:
                # Only the guest may not be there.
                assert "guest" in kind.experts
                self.refused += 1
                continue
            if random.random() < 0.1:
                await answering.some(random.randrange(1, 5))
                await answering.leave()
                self.cancelled += 1
            else:
                self._note(kind, await answering.all())

    def _choose(self, random: Random, request_id: str) -> tuple[Kind, Any]:
        catalog = self.server.plain.catalog
        if catalog.presets and random.random() < 0.1:
            fusion = catalog.presets["house"]
            kind = next(found for found in PRESETS if parse_fusion(dict(found.fusion)) == fusion)
            return kind, kind.submission(request_id)
        kind = random.choice(self.kinds)
        return kind, kind.submission(request_id)

    async def _submit(self, submission: Any, random: Random) -> Answering:
        """As the HTTP layer does it; some take long between the lease and the queue."""
        while True:
            try:
                with self.server.plain.offers.lease() as lease:
                    if random.random() < 0.1:
                        await asyncio.sleep(0.5 * random.random())
                    return self.server.stream(submission, lease)
            except ExpertParked as parked:
                await self.server.manager.wake(parked.name, 20.0)

    def _note(self, kind: Kind, results: list[Any]) -> None:
        for index, result in enumerate(results):
            last = result.last
            assert last.finish_reason is FinishReason.LENGTH, (kind.fusion, last.finish_reason, last.error)
            generations = {} if last.fusion is None else last.fusion.generations
            contents = {name: self.server.contents[name, number] for name, number in generations.items()}
            assert contents.keys() == set(kind.experts)
            self.answers[kind, index, tuple(sorted(contents.items())), tuple(result.tokens)] += 1

    def stop(self) -> None:
        self._stop = True


#: Where else than everywhere a change can fail.
_POINTS_OF = {"delete": ("delete", "audit begun", "audit done"), "rollback": ("roll back", *Faults.POINTS)}


class Changer:
    """Changes one expert again and again. `done` counts what it did, by kind and outcome."""

    def __init__(self, server: Server, faults: Faults, name: str, done: Counter[str], seed: int) -> None:
        self._server = server
        self._faults = faults
        self._name = name
        self._done = done
        self._random = Random(seed)

    async def run(self, enough: Callable[[], bool]) -> None:
        while not enough():
            await self._change()
            if self._name != "guest":  # whatever went wrong, it serves
                assert self._server.manager.expert(self._name).state == "published"

    async def _change(self) -> None:
        kinds = ["put"] * 5 + ["rollback"] * 2 + ["broken"]
        if self._name == "guest":
            kinds += ["delete"] * 3
        kind = self._random.choice(kinds)
        point = None
        if self._random.random() < 0.4:
            point = self._random.choice(_POINTS_OF.get(kind, Faults.POINTS))
            self._faults.arm(point, self._name)
        try:
            outcome = await getattr(self, f"_{kind}")(point)
        except (StateError, SwapConflict, LoadError, UnknownModel) as error:
            outcome = f"refused: {type(error).__name__}"
        self._faults.disarm(self._name)
        self._done[f"{kind}: {outcome}"] += 1

    async def _put(self, point: str | None) -> str:
        world = self._server.world
        content: Any = self._random.choice(list(world.contents))
        if point == "files change":
            content = world.spec(world.changing)
        return await self._changed(self._server.put(self._name, content))

    async def _broken(self, point: str | None) -> str:
        broken = self._random.choice(list(self._server.world.broken.values()))
        return await self._changed(self._server.put(self._name, broken))

    async def _rollback(self, point: str | None) -> str:
        return await self._changed(self._server.roll_back(self._name))

    async def _delete(self, point: str | None) -> str:
        return (await self._server.delete(self._name)).state

    async def _changed(self, change: Awaitable[Any]) -> str:
        before = self._serving()
        await change
        return "failed" if self._serving() == before else "done"

    def _serving(self) -> int | None:
        known = {status.name: status.generation for status in self._server.manager.experts()}
        return known.get(self._name)


def swapped(done: Mapping[str, int]) -> int:
    return done.get("put: done", 0) + done.get("rollback: done", 0)


async def change_presets(server: Server, done: Counter[str], enough: Callable[[], bool]) -> None:
    """A preset that comes, is replaced, and goes."""
    random = Random(99)
    while not enough():
        await asyncio.sleep(0.05)
        try:
            if random.random() < 0.6:
                fusion = dict(random.choice(PRESETS).fusion)
                await asyncio.to_thread(server.manager.put_preset, "house", fusion, actor="operator")
                done["preset: put"] += 1
            else:
                await asyncio.to_thread(server.manager.delete_preset, "house", actor="operator")
                done["preset: deleted"] += 1
        except UnknownModel:
            pass


async def to_the_start(server: Server) -> None:
    """The starting set of experts, each without a generation to go back to, and everything that was ordered done."""
    for name in server.manager.presets():
        server.manager.delete_preset(name, actor="operator")
    for status in server.manager.experts():
        await server.delete(status.name)
    for name, content in HOSTS.items():
        assert (await server.put(name, content)).state == "published"
    await server.quiet()


def resident_bytes() -> int:
    """Of the process, after everything that can be given back to the system has been: Python's garbage, and what the C
    library keeps of freed memory, which would otherwise depend on what happened to be freed last."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def weight_bytes() -> int:
    """Of all weights that anything in the process still holds."""
    gc.collect()
    held = [item.untyped_storage() for item in gc.get_objects() if type(item) is torch.nn.Parameter]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


async def churn(server: Server, faults: Faults, load: Load, swaps: int, seed: int) -> Counter[str]:
    """Streams and changes side by side, until so many swaps and rollbacks have been made and, warm-ups apart, every
    fault has happened. Returns when all streams have ended."""
    done: Counter[str] = Counter()

    def enough() -> bool:
        everything = set(faults.happened) == set(Faults.POINTS) and done["delete: deleted"] > 1
        return swapped(done) >= swaps and (everything or swaps < SWAPS)

    streams = [asyncio.create_task(load.run(seed * STREAMS + number)) for number in range(STREAMS)]
    changers = [
        Changer(server, faults, name, done, seed * 10 + number).run(enough)
        for number, name in enumerate((*HOSTS, "guest"))
    ]
    try:
        await asyncio.gather(*changers, change_presets(server, done, enough))
    finally:
        load.stop()
        await asyncio.gather(*streams)
    return done


def check_each_step(server: Server, patch: pytest.MonkeyPatch) -> None:
    """A step that leaves the bookkeeping broken ends the engine, and with it the test."""
    step = server.plain.step

    def checked() -> Any:
        events = step()
        server.plain.check()
        return events

    patch.setattr(server.plain, "step", checked)


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Loads rest less for the sake of steps than they usually do, which would take minutes."""
    patch.setattr("proxyserve.experts.pacing._REST_SECONDS", 1e-4)


@pytest.mark.slow
async def test_swaps_under_load_and_failure(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    check_each_step(server, monkeypatch)
    hurry(monkeypatch)
    # pytest keeps what is logged, tracebacks with their frames included, and so the weights that were being loaded.
    monkeypatch.setattr(logging.getLogger("proxyserve.experts.manager"), "disabled", True)
    faults = Faults(server, monkeypatch)
    await to_the_start(server)
    start = server.holdings()

    load = Load(server)
    await churn(server, faults, load, WARM_UP, seed=1)
    await to_the_start(server)
    assert server.idle() and server.holdings() == start
    warm, begun = resident_bytes(), weight_bytes()

    faults.happened.clear()
    load = Load(server, answers=load.answers)
    done = await churn(server, faults, load, SWAPS, seed=2)
    await to_the_start(server)
    assert server.idle() and server.holdings() == start
    end, tensors = resident_bytes(), weight_bytes()

    assert done["rollback: done"] > SWAPS / 10, done
    assert load.cancelled > 5 and load.answers.total() > SWAPS
    assert abs(end - warm) < 0.02 * warm, (warm, end)
    # Errors that are remembered hold a few. One model's worth per swap would be ten times as much.
    assert tensors < 3 * begun, (begun, tensors)
    assert len({contents for _, _, contents, _ in load.answers}) > 20
    check_answers(server, load.answers)


#: More experts than there is room for.
GUESTS = ("qa", "record", "bio", "law", "math")
GUEST_KINDS = tuple(proxy_kind({name: 1.0}, PROMPTS[2], seed=seed) for name in GUESTS for seed in (None, 8))


@pytest.mark.slow
async def test_swaps_with_too_little_room(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is needed is loaded again, at the cost of what is not: two streams, and one change at a time."""
    folders = ("first", "second", "diff", "compressed", "merge")
    with open_world(world, state_dir=tmp_path / "state", evict_idle=True) as server:
        hurry(monkeypatch)
        for name, content in zip(GUESTS[:4], folders, strict=False):
            await server.put(name, content)
        server.manager._room.policy = MemoryPolicy(server.plain.residents.bytes, evict_idle=True)
        await server.put(GUESTS[4], folders[4])
        load = Load(server, kinds=GUEST_KINDS)
        streams = [asyncio.create_task(load.run(seed)) for seed in range(2)]
        random, done = Random(7), Counter[str]()
        try:
            while swapped(done) < 25:
                name = random.choice(GUESTS)
                try:
                    if random.random() < 0.4:
                        status = await server.roll_back(name)
                        kind = "rollback"
                    else:
                        status = await server.put(name, random.choice(folders))
                        kind = "put"
                except SwapConflict:  # nothing to go back to, or it is being woken
                    continue
                done[f"{kind}: {'failed' if status.last_error else 'done'}"] += 1
                assert status.last_error is None, status.last_error
        finally:
            load.stop()
            await asyncio.gather(*streams)
        await server.quiet()
        assert server.idle()
        assert server.plain.residents.bytes <= server.manager._room.policy.limit
        assert server.manager.counters.wakes > 5 and server.manager.counters.evictions > 10
        assert server.manager.counters.failures == {}
        assert len({contents for _, _, contents, _ in load.answers}) > 10
        check_answers(server, load.answers)


def check_answers(server: Server, answers: Mapping[Answer, int]) -> None:
    """Each is what plain forwards of the contents that it names come to."""
    for kind, index, contents, tokens in answers:
        expected = server.references.tokens(kind, dict(contents), index)
        assert list(tokens) == expected, (kind.fusion, contents)
