"""How long it takes to swap an expert while streams run, and what the streams notice.

    quiet │ swap │ quiet │ swap │ quiet ...      streams go on all the while

Each swap is held against a stretch without one, equally long and right before it. Contents take turns, and none that
comes is in memory already. An answer that ends makes way for a new request, which gets the generation that serves then.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

from proxyserve.bench.models import BenchFamily
from proxyserve.bench.variants import write_variant
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.loop import AsyncEngine
from proxyserve.engine.runner import Runner
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.errors import InvalidRequest
from proxyserve.experts.audit import AuditLog
from proxyserve.experts.library import Library
from proxyserve.experts.manager import ExpertManager
from proxyserve.experts.room import MemoryPolicy
from proxyserve.experts.roots import Roots
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.experts.store import StateStore
from proxyserve.fusion.fusion import Fusion, proxy
from proxyserve.models.loading import Placement, load_model
from proxyserve.models.model_set import ModelSet
from proxyserve.types import ModelKey, SamplingParams

STREAMS = (8, 32)
SWAPS = 12

_FUSIONS = (
    proxy({"swapped": 1.0}),
    proxy({"steady": 0.5}),
    proxy({"swapped": 0.5, "steady": 0.5}),
    Fusion(),
)
#: Tokens of an answer. Prompts are short: it is not they that shall be noticed.
_PROMPT, _ANSWER = 4, 192
#: A stretch goes on for so many usual gaps after the swap, in which the generation that nobody needs now is let go.
_AFTER = 3
_KV_MEMORY = 2**30
_MEMORY = 2**33


@dataclass(frozen=True, slots=True)
class SwapRow:
    """With `streams` running, all in seconds. `published` has the time from put to published of each swap, `phases` the
    medians of what it is spent on. `worst` has, for each swap, the longest time between two tokens that any stream saw
    during it, `quiet_worst` the longest in the stretch before it, and `usual` the median of all streams there."""

    streams: int
    published: tuple[float, ...]
    phases: Mapping[str, float]
    usual: tuple[float, ...]
    worst: tuple[float, ...]
    quiet_worst: tuple[float, ...]

    @property
    def ratios(self) -> dict[str, float]:
        """Of the longest gaps to the usual one: those of the median swap and of the worst, and likewise without."""
        swap = [worst / usual for worst, usual in zip(self.worst, self.usual, strict=True)]
        quiet = [worst / usual for worst, usual in zip(self.quiet_worst, self.usual, strict=True)]
        return {
            "swap": median(swap),
            "worst swap": max(swap),
            "quiet": median(quiet),
            "worst quiet": max(quiet),
        }


def measure_swaps(
    family: BenchFamily,
    placement: Placement,
    *,
    streams: Sequence[int] = STREAMS,
    swaps: int = SWAPS,
    progress: Callable[[str], None] = lambda message: None,
) -> list[SwapRow]:
    """A row for each number of streams."""
    with TemporaryDirectory(dir=family.base.parent) as folder:
        # Streams keep what they began with in memory, so there are as many as one measurement publishes.
        contents = [write_variant(family.tuned, Path(folder) / str(seed), seed) for seed in range(swaps + 2)]
        with _serving(family, placement, max(streams), Path(folder) / "state") as (engine, manager):
            swapper = _Swapper(manager, family, contents)
            progress("loading the models")
            asyncio.run(swapper.begin())
            return [asyncio.run(_measure(engine, swapper, number, swaps, progress)) for number in streams]


@contextmanager
def _serving(
    family: BenchFamily, placement: Placement, max_batch: int, state: Path
) -> Iterator[tuple[AsyncEngine, ExpertManager]]:
    """A running engine without experts, and what brings them: a server but for HTTP."""
    base = load_model(family.base, ModelKey("base-model"), placement)
    runner = Runner(base)
    library = Library(base, runner, placement)
    config = EngineConfig(max_batch=max_batch, kv_memory=_KV_MEMORY)
    engine = AsyncEngine(Engine(ModelSet(base), config, runners=[runner], grows=True))
    manager = ExpertManager(
        engine,
        library,
        StateStore.open(state),
        AuditLog.open(state),
        Roots([family.base.parent]),
        MemoryPolicy(_MEMORY),
        parse_preset=_refuse_preset,
    )
    manager.start()
    engine.start()
    gc.collect()
    gc.freeze()  # as a server does
    try:
        yield engine, manager
    finally:
        gc.unfreeze()
        manager.close()
        engine.close()


def _refuse_preset(value: Mapping[str, object]) -> Fusion:
    raise InvalidRequest("there are no presets in a benchmark")


class _Swapper:
    """Publishes one content after the other as the expert `swapped`, beside which there is `steady`."""

    def __init__(self, manager: ExpertManager, family: BenchFamily, contents: Sequence[Path]) -> None:
        self._manager = manager
        self._family = family
        self._contents = contents
        self._number = 0

    async def begin(self) -> None:
        await self._put("steady", self._family.second)
        await self.swap()

    async def swap(self) -> Mapping[str, float]:
        """Returns the seconds of its phases."""
        content = self._contents[self._number % len(self._contents)]
        self._number += 1
        return await self._put("swapped", content)

    async def _put(self, name: str, tuned: Path) -> Mapping[str, float]:
        spec = ExpertSpec(Source(path=str(tuned)), Source(path=str(self._family.untuned)))
        change = await asyncio.to_thread(self._manager.put, name, spec, actor="bench")
        status = await self._manager.settled(change)
        generation = next(found for found in status.generations if found.generation == change.generation)
        if generation.error is not None:
            raise RuntimeError(generation.error)
        return generation.seconds


async def _measure(
    engine: AsyncEngine, swapper: _Swapper, streams: int, swaps: int, progress: Callable[[str], None]
) -> SwapRow:
    phases: list[Mapping[str, float]] = []
    published: list[float] = []
    marks: list[
        tuple[float, float, float]
    ] = []  # begin of the quiet stretch, of the swap, and the swap's end
    async with _running(engine, streams) as answers:
        begun = perf_counter()
        await swapper.swap()
        length = perf_counter() - begun
        rest = _AFTER * median(_gaps(answers, 0.0, perf_counter()))
        for number in range(swaps):
            progress(f"{streams} streams, swap {number + 1} of {swaps}")
            await asyncio.sleep(rest)
            quiet = perf_counter()
            await asyncio.sleep(length)
            begun = perf_counter()
            phases.append(await swapper.swap())
            published.append(perf_counter() - begun)
            await asyncio.sleep(rest)
            marks.append((quiet, begun, perf_counter()))
            length = marks[-1][2] - begun
    return SwapRow(
        streams=streams,
        published=tuple(published),
        phases={str(name): median(spent[name] for spent in phases) for name in phases[0]},
        usual=tuple(median(_gaps(answers, quiet, begun)) for quiet, begun, _ in marks),
        worst=tuple(max(_gaps(answers, begun, end)) for _, begun, end in marks),
        quiet_worst=tuple(max(_gaps(answers, quiet, begun)) for quiet, begun, _ in marks),
    )


@asynccontextmanager
async def _running(engine: AsyncEngine, streams: int) -> AsyncIterator[list[list[float]]]:
    """So many streams inside, each of which has had some tokens. Yields a list that is filled with the times of the
    tokens of each answer."""
    answers: list[list[float]] = []
    begun = [asyncio.Event() for _ in range(streams)]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_stream(engine, number, streams, event, answers))
            for number, event in enumerate(begun)
        ]
        for event in begun:
            await event.wait()
        yield answers
        for task in tasks:
            task.cancel()


async def _stream(
    engine: AsyncEngine, number: int, streams: int, begun: asyncio.Event, answers: list[list[float]]
) -> None:
    """One request after the other, until it is cancelled. First answers are of different lengths, so that streams end
    one after the other."""
    fusion = _FUSIONS[number % len(_FUSIONS)]
    prompt = LanePrompts(tuple(range(1 + number, 1 + number + _PROMPT)))
    for turn in count():
        length = _ANSWER if turn else _AFTER + _ANSWER * (number + 1) // streams
        sampling = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        times: list[float] = []
        answers.append(times)
        with engine.engine.offers.lease() as lease:
            stream = engine.submit(
                [Submission(f"{streams}-{number}-{turn}", prompt, sampling, fusion)], lease
            )
        async with stream:
            async for event in stream:
                times.extend(perf_counter() for _ in event.token_ids)
                if len(times) >= _AFTER:
                    begun.set()


def _gaps(answers: Sequence[Sequence[float]], begin: float, end: float) -> list[float]:
    """Between two tokens of one answer, of which the second came in that time."""
    return [after - before for times in answers for before, after in pairwise(times) if begin <= after < end]
