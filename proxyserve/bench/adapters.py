"""Many experts in use at once: as adapters over one small model, as full models, and one expert for everybody.

All of them are in one engine, and their turns alternate. What counts is decoding: a token of each request per step.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from proxyserve.bench.models import BenchFamily
from proxyserve.bench.variants import write_adapter, write_variant
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.offer import Offer
from proxyserve.engine.runner import Runner
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.experts.library import Library
from proxyserve.experts.loading import LoadedExpert
from proxyserve.experts.recipe import make_recipe
from proxyserve.experts.roots import Roots
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.fusion.fusion import proxy
from proxyserve.models.loaded_model import Expert
from proxyserve.models.loading import Placement, load_model
from proxyserve.models.model_set import ModelSet
from proxyserve.types import ModelKey, SamplingParams

EXPERTS = 32
RANK = 8
TURNS = 5
#: Timed steps of a turn.
STEPS = 16

_KV_MEMORY = 2**30


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """Experts that the requests share out among them. `step` is in seconds. `bytes` are what they added to the memory
    that the engine accounts for, `resident_bytes` what they added to that of the process (0 where the system does not
    say); their untuned model is not in either."""

    experts: str
    number: int
    step: float
    bytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterResult:
    """With `requests` at once, each with tuned and untuned model and the base. Adapters have rank `rank` and change all
    linear layers but the head."""

    requests: int
    rank: int
    one: AdapterRow
    adapters: AdapterRow
    full: AdapterRow

    @property
    def rows(self) -> tuple[AdapterRow, ...]:
        return (self.one, self.adapters, self.full)

    def tokens_per_second(self, row: AdapterRow) -> float:
        """Of all requests together."""
        return self.requests / row.step

    @property
    def ratios(self) -> dict[str, float]:
        return {
            "adapters / full": self.full.step / self.adapters.step,
            "adapters / one": self.one.step / self.adapters.step,
            "full / one": self.one.step / self.full.step,
            "bytes per full expert / per adapter": (self.full.bytes / self.full.number)
            / (self.adapters.bytes / self.adapters.number),
        }


def measure_adapters(
    family: BenchFamily,
    placement: Placement,
    *,
    experts: int = EXPERTS,
    rank: int = RANK,
    prompt: int = 16,
    turns: int = TURNS,
    steps: int = STEPS,
    progress: Callable[[str], None] = lambda message: None,
) -> AdapterResult:
    """`experts` requests at once, `prompt` tokens each; `turns` and `steps` as above."""
    crowd = _Crowd(family, placement, experts, prompt, steps)
    seeds = count()

    def adapter(folder: Path) -> Path:
        return write_adapter(family.untuned, folder, next(seeds), rank=rank)

    def variant(folder: Path) -> Path:
        return write_variant(family.tuned, folder, next(seeds))

    rows = []
    for name, number, write in (
        ("one full expert", 1, variant),
        (f"{experts} adapters", experts, adapter),
        (f"{experts} full experts", experts, variant),
    ):
        progress(f"loading {name}")
        rows.append(crowd.add(name, number, write))
    seconds: dict[str, list[float]] = {row.experts: [] for row in rows}
    for turn in range(turns):
        progress(f"many experts, turn {turn + 1} of {turns}")
        for name, found in seconds.items():
            found.append(crowd.turn(name))
    one, adapters, full = (replace(row, step=median(seconds[row.experts])) for row in rows)
    return AdapterResult(experts, rank, one, adapters, full)


class _Crowd:
    """An engine and groups of experts over one untuned model, which are added one group after the other."""

    def __init__(
        self, family: BenchFamily, placement: Placement, requests: int, prompt: int, steps: int
    ) -> None:
        base = load_model(family.base, ModelKey("base-model"), placement)
        runner = Runner(base)
        self._library = Library(base, runner, placement)
        self._untuned = Source(path=str(family.untuned))
        self._folder = family.base.parent
        # The small model is there before anybody counts.
        self._first = self._load("first", Source(path=str(family.second)))
        config = EngineConfig(max_batch=requests, kv_memory=_KV_MEMORY, prefix_cache=False)
        models = ModelSet(base, [self._first.expert])
        self._engine = Engine(models, config, runners=self._library.runners())
        self._groups: dict[str, list[Expert]] = {}
        self._requests = requests
        self._prompt = prompt
        self._steps = steps
        self._turns = count()

    def _load(self, name: str, tuned: Source) -> LoadedExpert:
        spec = ExpertSpec(tuned, self._untuned, trusted=True)
        return self._library.load(make_recipe(spec, Roots()), name, 1)

    def add(self, group: str, number: int, write: Callable[[Path], Path]) -> AdapterRow:
        """Load as many experts as `number`, each written by `write` into the folder that it is given. Their row lacks
        `step`."""
        engine = self._engine
        bytes_before, resident_before = engine.residents.bytes, _resident_bytes()
        experts = []
        for index in range(number):
            with TemporaryDirectory(dir=self._folder) as folder:
                path = write(Path(folder) / "expert")
                loaded = self._load(f"{len(self._groups)}-{index}", Source(path=str(path)))
            arenas = engine.residents.arenas
            engine.adopt([(runner, arenas[runner.layout]) for runner in loaded.fresh], loaded.over_trunks)
            experts.append(loaded.expert)
        self._groups[group] = experts
        current = engine.offers.current
        everybody = [self._first.expert, *(expert for known in self._groups.values() for expert in known)]
        models = ModelSet(current.catalog.models.base, everybody)
        engine.offers.replace(Offer(replace(current.catalog, models=models), current.policy))
        self.turn(group)  # adapters in use need memory for being put together
        return AdapterRow(
            experts=group,
            number=number,
            step=float("nan"),
            bytes=engine.residents.bytes - bytes_before,
            resident_bytes=_resident_bytes() - resident_before,
        )

    def turn(self, group: str) -> float:
        """Median seconds of a step in which every request gets a token and none has a prompt left."""
        engine, experts, turn = self._engine, self._groups[group], next(self._turns)
        generator = torch.Generator().manual_seed(0)
        vocabulary = engine.models.base.vocabulary.size
        prompts = torch.randint(1, vocabulary, (self._requests, self._prompt), generator=generator).tolist()
        # Some tokens more than are timed: prompts end one after another, and no answer may by then.
        most = self._steps + 2 * self._requests
        sampling = SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True)
        keys = []
        for number, ids in enumerate(prompts):
            fusion = proxy({experts[number % len(experts)].name: 1.0})
            keys += engine.submit(Submission(f"{turn}-{number}", LanePrompts(tuple(ids)), sampling, fusion))
        started: set[str] = set()
        while len(started) < self._requests:
            started |= {event.request_id for event in engine.step() if event.token_ids}
        seconds = []
        for _ in range(self._steps):
            before = perf_counter()
            engine.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(perf_counter() - before)
        for key in keys:
            engine.cancel(key)
        return median(seconds)


def _resident_bytes() -> int:
    """Of the process, 0 where the system does not say."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
