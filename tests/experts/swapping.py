"""A server without HTTP over tiny models: its engine at work, and the manager of its experts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from proxyserve.cli.opening import open_server
from proxyserve.cli.settings import ExpertSettings, ServeSettings
from proxyserve.config import EngineConfig, PairsChoice, ServerConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.engine.offer import Lease
from proxyserve.engine.submission import Submission
from proxyserve.experts.generation import Phase
from proxyserve.experts.ledger import Generation
from proxyserve.experts.library import Library
from proxyserve.experts.manager import ExpertManager
from proxyserve.experts.source import ExpertSpec
from proxyserve.experts.status import Change, ExpertStatus
from proxyserve.fusion.policy import FusionPolicy
from tests.engine.driver import Collected
from tests.experts.contents import World
from tests.experts.kinds import Kind, References


@dataclass
class Server:
    """An engine at work and its manager. `contents` says what each generation was put as."""

    engine: AsyncEngine
    manager: ExpertManager
    world: World
    messages: Sequence[str] = ()
    contents: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def plain(self) -> Engine:
        return self.engine.engine

    @property
    def library(self) -> Library:
        return self.manager._library

    @cached_property
    def references(self) -> References:
        return References(self.world, self.plain.models.base.vocabulary.size)

    # Changes

    async def put(self, name: str, content: str | ExpertSpec) -> ExpertStatus:
        """Wait until it serves or has failed. Raises what `ExpertManager.put` does."""
        return await self.manager.settled(await self.begin_put(name, content))

    async def begin_put(self, name: str, content: str | ExpertSpec) -> Change:
        spec = self.world.contents[content].spec if isinstance(content, str) else content
        change = await asyncio.to_thread(self.manager.put, name, spec, actor="operator")
        if isinstance(content, str):
            self.contents[name, change.generation] = content
        return change

    async def roll_back(self, name: str) -> ExpertStatus:
        return await self.manager.settled(
            await asyncio.to_thread(self.manager.rollback, name, actor="operator")
        )

    async def delete(self, name: str) -> ExpertStatus:
        return await self.manager.settled(
            await asyncio.to_thread(self.manager.delete, name, actor="operator")
        )

    # Requests

    def stream(self, submission: Submission, lease: Lease | None = None) -> Answering:
        """Submit it from the lease, or from one of now."""
        if lease is not None:
            return Answering(self.engine.submit([submission], lease), submission)
        with self.plain.offers.lease() as current:
            return Answering(self.engine.submit([submission], current), submission)

    async def ask(self, kind: Kind, request_id: str, **changed: Any) -> list[Collected]:
        return await self.stream(kind.submission(request_id, **changed)).all()

    def expected(self, kind: Kind, answer: Collected, index: int = 0) -> list[int]:
        """The reference's tokens for the generations that the answer names."""
        assert answer.last is not None
        report = answer.last.fusion
        generations = {} if report is None else report.generations
        assert set(generations) == set(kind.experts)
        return self.references.tokens(
            kind, {name: self.contents[name, number] for name, number in generations.items()}, index
        )

    # What there is

    def generation(self, name: str, number: int) -> Generation:
        return self.manager._roster.entries[name].generations[number]

    def states(self) -> dict[str, str]:
        return {status.name: status.state for status in self.manager.experts()}

    def idle(self) -> bool:
        """No request, nothing held, nobody draining."""
        offers = self.plain.offers
        return (
            not self.plain.has_work
            and not offers._held
            and not offers._leased
            and not self.manager._roster._draining
        )

    def holdings(self) -> dict[str, int]:
        """All that experts bring with them, in numbers."""
        residents = self.plain.residents
        runners = [
            self.library.shelf.base.runner,
            *(found.runner for found in self.library.shelf.residents.values()),
        ]
        return {
            "bytes": residents.bytes,
            "runners": len(residents.runners),
            "pools": len(residents.pools),
            "arenas": len(residents.arenas),
            "adapters": sum(len(runner.adapters) for runner in runners),
            "hooks": sum(len(runner.adapters._hooks) for runner in runners),
            "library": len(self.library.shelf.residents),
            "users": sum(found.users for found in self.library.shelf.residents.values()),
            "blocks in use": sum(arena.pool.in_use for arena in residents.arenas.values()),
            "grouped": sum(len(group) for group in residents.groups._groups.values() if group is not None),
            "held": len(self.plain.offers._held),
            "leased": len(self.plain.offers._leased),
            "choices": len(self.plain._choices),
            "loads on disk": self.manager._store._connection.execute("SELECT count(*) FROM loads").fetchone()[
                0
            ],
        }

    async def quiet(self) -> None:
        """Return when the loader thread and the engine's have done all that was ordered so far."""
        done = threading.Event()
        self.manager._jobs.put(done.set)
        assert await asyncio.to_thread(done.wait, 20)
        await asyncio.wrap_future(self.engine.between_steps(lambda: None))


class Answering:
    """A stream, and what has come of it."""

    def __init__(self, stream: Any, submission: Submission) -> None:
        self._stream = stream
        self._results = [Collected() for _ in range(submission.n)]

    async def all(self) -> list[Collected]:
        """Every choice to its end."""
        async for event in self._stream:
            self._results[event.index].add(event)
        return self._results

    async def some(self, events: int) -> None:
        """A few events; whoever wants no more leaves with `leave`."""
        async for event in self._stream:
            self._results[event.index].add(event)
            events -= 1
            if events <= 0:
                return

    async def leave(self) -> None:
        await self._stream.aclose()


@contextmanager
def open_world(
    world: World,
    *,
    state_dir: Path | None = None,
    limit: int | None = None,
    evict_idle: bool = False,
    presets: Mapping[str, str] | None = None,
    policy: FusionPolicy | None = None,
    max_batch: int = 16,
    pairs: PairsChoice = "auto",
    tensor_parallel: int = 1,
    start: bool = True,
) -> Iterator[Server]:
    """A server as the command line opens it, with the base alone; `limit` is in bytes for all weights and KV."""
    settings = ServeSettings(
        EngineConfig(
            max_batch=max_batch,
            max_batch_tokens=max(64, 2 * max_batch),
            kv_memory=2**21,
            block_size=4,
            pairs=pairs,
            device="cpu",
            dtype="float32",
            tensor_parallel=tensor_parallel,
        ),
        ServerConfig(),
        policy or FusionPolicy(),
        presets or {},
        {},
        ExpertSettings((world.root,), state_dir=state_dir, memory=limit, evict_idle=evict_idle),
    )
    with open_server(
        world.family.base,
        [],
        settings,
        served_name="atlas",
        progress=lambda _: None,
    ) as opened:
        if start:
            opened.engine.start()
        try:
            yield Server(opened.engine, opened.experts, world, opened.messages)
        finally:
            opened.engine.close()


async def begin(server: Server, kind: Kind, request_id: str) -> Answering:
    """A request that has its first token and many more to come."""
    running = server.stream(kind.submission(request_id, max_tokens=200))
    await running.some(1)
    return running


async def check_answer(server: Server, kind: Kind, generation: int, request_id: str = "check") -> None:
    """The one expert of the kind serves, as that generation, what the reference says."""
    (answer,) = await server.ask(kind, request_id)
    assert answer.last is not None and answer.last.fusion is not None
    assert list(answer.last.fusion.generations.values()) == [generation]
    assert answer.tokens == server.expected(kind, answer)


async def wait_until(condition: Callable[[], bool]) -> None:
    """For things that another thread does soon."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (threads set no asyncio.Event)
            await asyncio.sleep(0.002)


async def evict_standing_by(server: Server) -> None:
    """As the memory plan does when room is wanted."""
    roster = server.manager._roster
    await wait_until(lambda: server.idle())
    with roster.lock:
        standing = [found for found in roster.loaded_generations() if found.phase is Phase.STANDBY]
        freed = [roster.retire(found) for found in standing]
    assert freed
    for future in freed:
        await asyncio.wrap_future(future)
