"""One round of load: so many clients that wait for their answers, or arrivals that wait for nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

from proxyserve.bench.load.answer import Answer, Checks, Failure, read_answer
from proxyserve.bench.load.arrivals import poisson
from proxyserve.bench.load.wire import Address, Exchange, exchange
from proxyserve.bench.load.workload import Ask, Workload

#: Seconds between two looks at whether the generator itself is late.
_TICK = 0.05
#: A client that is told when to come back waits for so long at most, in seconds.
_MOST_WAIT = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how it is asked. `extra` are fields for every body; one that is None is left out, also where the
    generator would have set it. `chat`: prompts are conversations of one turn."""

    url: str
    key: str | None = None
    chat: bool = False
    stream: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    checks: Checks = field(default_factory=Checks)
    timeout: float = 600.0

    @property
    def address(self) -> Address:
        """Raises ProxyserveError where `url` is none."""
        return Address.parse(self.url, "/chat/completions" if self.chat else "/completions", self.key)

    def body(self, ask: Ask) -> bytes:
        """The JSON of a request."""
        fields: dict[str, Any] = {"model": ask.model, "max_tokens": ask.max_tokens, "ignore_eos": True}
        if self.chat:
            fields["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            fields["prompt"] = ask.prompt
        if self.stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        fields |= self.extra
        return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


@dataclass(frozen=True, slots=True)
class Load:
    """`requests` in all, either by `clients` that each ask again as soon as they are answered, or at `rate` per second
    in the mean, whatever becomes of them."""

    requests: int
    clients: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        assert (self.clients is None) != (self.rate is None)

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return f"{self.clients} client{'' if self.clients == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Round:
    """What came of one round. Seconds. `late`: by how much each arrival was sent after its time (none with clients that
    wait). `lag`: by how much the generator woke up late when it had asked for a time, which is what it adds to the
    times that it measures. `cpu` is what its process used."""

    seconds: float
    answers: tuple[Answer, ...]
    failures: tuple[Failure, ...]
    late: tuple[float, ...]
    lag: tuple[float, ...]
    cpu: float

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(answer.tokens for answer in self.answers)


_Send = Callable[[int], Coroutine[Any, Any, Exchange]]


async def run_round(target: Target, workload: Workload, load: Load, *, first: int = 0) -> Round:
    """Ask for the requests from number `first` on. Nothing that the server does raises."""
    asks = [workload.ask(first + number) for number in range(load.requests)]
    bodies = [target.body(ask) for ask in asks]
    address = target.address
    lag: list[float] = []
    late: list[float] = []
    started, used = perf_counter(), process_time()

    def send(number: int) -> Coroutine[Any, Any, Exchange]:
        return exchange(address, bodies[number], patience=target.timeout)

    async with _watching(lag):
        if load.clients is not None:
            records = await _closed(send, load.requests, load.clients)
        else:
            assert load.rate is not None
            arrivals = poisson(load.rate, load.requests, workload.seed + first)
            records = await _open(send, arrivals, late)
    seconds, cpu = perf_counter() - started, process_time() - used
    # Only now, when nobody's time is taken any more.
    found = [read_answer(ask, record, target.checks) for ask, record in zip(asks, records, strict=True)]
    return Round(
        seconds,
        tuple(one for one in found if isinstance(one, Answer)),
        tuple(one for one in found if isinstance(one, Failure)),
        tuple(late),
        tuple(lag),
        cpu,
    )


async def _closed(send: _Send, requests: int, clients: int) -> Sequence[Exchange]:
    records: dict[int, Exchange] = {}
    numbers: Iterator[int] = iter(range(requests))

    async def client() -> None:
        for number in numbers:
            records[number] = record = await send(number)
            if record.status in (429, 503) and record.retry_after is not None:
                await asyncio.sleep(min(record.retry_after, _MOST_WAIT))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(client())
    return [records[number] for number in range(requests)]


async def _open(send: _Send, arrivals: Sequence[float], late: list[float]) -> Sequence[Exchange]:
    started = perf_counter()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for number, arrival in enumerate(arrivals):
            await asyncio.sleep(max(0.0, started + arrival - perf_counter()))
            late.append(max(0.0, perf_counter() - started - arrival))
            tasks.append(group.create_task(send(number)))
    return [task.result() for task in tasks]


@asynccontextmanager
async def _watching(lag: list[float]) -> AsyncIterator[None]:
    """Note in `lag` by how many seconds the event loop comes late, several times a second."""

    async def watch() -> None:
        while True:
            due = perf_counter() + _TICK
            await asyncio.sleep(_TICK)
            lag.append(max(0.0, perf_counter() - due))

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
