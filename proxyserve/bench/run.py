"""Fused decoding in proxyserve beside the plain Hugging Face loop: same models, same prompts, interleaved rounds; and
the other measurements, each over random models of the same shapes.

These machines are noisy, so what counts are the ratios within one run. Each round measures every contestant once; the
medians of the rounds are compared.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from proxyserve.bench.adapters import AdapterResult, measure_adapters
from proxyserve.bench.memory import MemoryRow, measure_memory
from proxyserve.bench.mixed import BATCH as MIXED_BATCH
from proxyserve.bench.mixed import MixedRow, measure_mixed
from proxyserve.bench.models import VOCABULARY, BenchFamily, build_bench_family
from proxyserve.bench.pairs import PairRow, measure_pairs
from proxyserve.bench.parts import Part, Sampling
from proxyserve.bench.peaked import Peaks
from proxyserve.bench.solving import BATCH as SOLVING_BATCH
from proxyserve.bench.solving import SolvingResult, measure_solving
from proxyserve.bench.speculation import DEMO, SIZES, SpeculationRow, measure_speculation
from proxyserve.bench.stalls import CONTEXT as LONG_CONTEXT
from proxyserve.bench.stalls import StallRow, measure_stalls
from proxyserve.bench.swaps import SwapRow, measure_swaps
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.evaluation.hf_loop import generate_fused
from proxyserve.fusion.fusion import Fusion, proxy
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import Placement, choose_placement
from proxyserve.types import SamplingParams

FUSED = proxy({"expert": 1.0})
PLAIN = Fusion()
KV_MEMORY = 2**30

_TOP_P = 0.9


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """`parts` are what is measured. `batches` are those that are held against the loop, each once with every one of
    `samplings`, `prompt` and `new` tokens per request there and with speculation, `rounds` how often each contestant is
    measured. `speculated` are the models for speculation, by name."""

    parts: tuple[Part, ...] = tuple(Part)
    batches: tuple[int, ...] = (1, 8, 32)
    samplings: tuple[Sampling, ...] = tuple(Sampling)
    prompt: int = 64
    new: int = 64
    rounds: int = 3
    dtype: str = "float32"
    device: str = "auto"
    threads: int = 1
    speculated: tuple[str, ...] = (next(iter(SIZES)), DEMO)
    mixed: tuple[int, ...] = (MIXED_BATCH,)


@dataclass(frozen=True, slots=True)
class BenchRow:
    """Generated tokens per second at one batch size, medians of the rounds. `loop_*` is the Hugging Face loop with the
    requests as one batch (the best case for it: equal lengths, all there at once), `single_fused` the same loop one
    request at a time, as the published code runs. `spread` is how far apart the slowest and the fastest round of any
    contestant are, as a part of its median."""

    batch: int
    fused: float
    base: float
    loop_fused: float
    loop_base: float
    single_fused: float
    sampling: Sampling = Sampling.GREEDY
    spread: float = 0.0

    @property
    def ratios(self) -> dict[str, float]:
        return {
            "fused / loop": self.fused / self.loop_fused,
            "fused / single": self.fused / self.single_fused,
            "base / loop": self.base / self.loop_base,
            "fused / base": self.fused / self.base,
        }


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured, empty or None for what was not. `solving` has a result per kind of laws, `swaps` a row per
    number of streams, `speculation` one per models, batch and share of drafts that stand, `pairs` one per size and
    number of models and tokens of each, `stalls` one per number of streams, with prompts in portions and without,
    `mixed` one per batch, without speculation and with it, `memory` one per process."""

    settings: BenchSettings
    machine: dict[str, str]
    rows: tuple[BenchRow, ...] = ()
    solving: tuple[SolvingResult, ...] = ()
    swaps: tuple[SwapRow, ...] = ()
    adapters: AdapterResult | None = None
    speculation: tuple[SpeculationRow, ...] = ()
    pairs: tuple[PairRow, ...] = ()
    stalls: tuple[StallRow, ...] = ()
    mixed: tuple[MixedRow, ...] = ()
    memory: tuple[MemoryRow, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        adapters = self.adapters
        return {
            "settings": asdict(self.settings),
            "machine": self.machine,
            "rows": [{**asdict(row), "ratios": row.ratios} for row in self.rows],
            "solving": [
                {
                    "laws": result.laws,
                    "batch": result.batch,
                    "rows": [{**asdict(row), "overhead": row.overhead} for row in result.rows],
                }
                for result in self.solving
            ],
            "swaps": [{**asdict(row), "ratios": row.ratios} for row in self.swaps],
            "adapters": None if adapters is None else {**asdict(adapters), "ratios": adapters.ratios},
            "speculation": [row.as_dict() for row in self.speculation],
            "pairs": [{**asdict(row), "ratios": row.ratios} for row in self.pairs],
            "stalls": [row.as_dict() for row in self.stalls],
            "mixed": [row.as_dict() for row in self.mixed],
            "memory": [row.as_dict() for row in self.memory],
        }


def run_bench(
    settings: BenchSettings, *, progress: Callable[[str], None] = lambda message: None
) -> BenchResult:
    """Make random models (base about 68M parameters, experts about 5M), measure, return. Takes minutes on a CPU."""
    torch.set_num_threads(settings.threads)
    transformers.utils.logging.disable_progress_bar()
    placement = choose_placement(settings.device, settings.dtype)
    parts = settings.parts
    rows: list[BenchRow] = []
    solving: list[SolvingResult] = []
    swaps: list[SwapRow] = []
    adapters = None
    for peaks in (None, Peaks()):
        if peaks is not None and Part.SOLVING not in parts:
            continue
        laws = _describe(peaks)
        progress(f"making random models, {laws}")
        with tempfile.TemporaryDirectory() as folder:
            family = build_bench_family(Path(folder), peaks=peaks)
            if peaks is None and Part.LOOP in parts:
                engine, peers = _load(family, placement, settings), _load_peers(family, placement)
                rows = [
                    _measure(engine, peers, batch, sampling, settings, progress)
                    for sampling in settings.samplings
                    for batch in settings.batches
                ]
                del engine, peers
            if Part.SOLVING in parts:
                engine = _load(family, placement, settings)
                solving.append(
                    measure_solving(
                        engine, "expert", "second", laws=laws, prompt=settings.prompt, progress=progress
                    )
                )
                del engine
            if peaks is None and Part.SWAPS in parts:
                swaps = measure_swaps(family, placement, progress=progress)
            if peaks is None and Part.ADAPTERS in parts:
                adapters = measure_adapters(family, placement, progress=progress)
    speculation: list[SpeculationRow] = []
    if Part.SPECULATION in parts:
        speculation = measure_speculation(
            placement,
            sizes=settings.speculated,
            prompt=settings.prompt,
            new=settings.new,
            rounds=settings.rounds,
            progress=progress,
        )
    pairs = measure_pairs(placement, progress=progress) if Part.PAIRS in parts else []
    stalls: list[StallRow] = []
    if Part.STALLS in parts:
        with tempfile.TemporaryDirectory() as folder:
            family = build_bench_family(Path(folder), context=LONG_CONTEXT)
            stalls = measure_stalls(family, placement, progress=progress)
    mixed: list[MixedRow] = []
    if Part.MIXED in parts:
        mixed = measure_mixed(
            placement,
            batches=settings.mixed,
            prompt=settings.prompt,
            new=settings.new,
            rounds=settings.rounds,
            progress=progress,
        )
    memory = measure_memory(placement, progress=progress) if Part.MEMORY in parts else []
    machine = _machine(placement.device)
    return BenchResult(
        settings,
        machine,
        tuple(rows),
        tuple(solving),
        tuple(swaps),
        adapters,
        tuple(speculation),
        tuple(pairs),
        tuple(stalls),
        tuple(mixed),
        tuple(memory),
    )


def _describe(peaks: Peaks | None) -> str:
    if peaks is None:
        return "laws of random models, nearly uniform"
    return f"laws of about {peaks.entropy:g} nats, KL(tuned || untuned) {peaks.kl:g}"


def _load(family: BenchFamily, placement: Placement, settings: BenchSettings) -> Engine:
    experts = [
        ExpertSource("expert", family.tuned, family.untuned),
        ExpertSource("second", family.second, family.untuned),
    ]
    most = max((*settings.batches, SOLVING_BATCH))
    # Drafts are measured by themselves.
    config = EngineConfig(max_batch=most, kv_memory=KV_MEMORY, prefix_cache=False, speculate="off")
    return Engine(load_family(family.base, experts, placement=placement), config)


def _load_peers(family: BenchFamily, placement: Placement) -> list[PreTrainedModel]:
    return [
        AutoModelForCausalLM.from_pretrained(folder, dtype=placement.dtype).eval().to(placement.device)
        for folder in family.folders
    ]


def _measure(
    engine: Engine,
    peers: Sequence[PreTrainedModel],
    batch: int,
    sampling: Sampling,
    settings: BenchSettings,
    progress: Callable[[str], None],
) -> BenchRow:
    generator = torch.Generator().manual_seed(batch)
    names = count()
    prompts = torch.randint(1, VOCABULARY, (batch, settings.prompt), generator=generator)
    on_device = prompts.to(peers[0].device)
    drawn = sampling is Sampling.TOP_P
    params = SamplingParams(
        max_tokens=settings.new,
        temperature=1.0 if drawn else 0.0,
        top_p=_TOP_P if drawn else 1.0,
        seed=batch,
        ignore_eos=True,
    )

    def ours(fusion: Fusion) -> float:
        for ids in prompts.tolist():
            name = f"{sampling}-{batch}-{next(names)}"
            engine.submit(Submission(name, LanePrompts(tuple(ids)), params, fusion))
        return _timed(lambda: [None for _ in _steps(engine)]) / (batch * settings.new)

    def loop(models: Sequence[PreTrainedModel], weights: Sequence[float], rows: Tensor) -> float:
        top_p = _TOP_P if drawn else None
        seconds = _timed(lambda: generate_fused(models, weights, rows, settings.new, top_p))
        return seconds / (len(rows) * settings.new)

    contestants: dict[str, Callable[[], float]] = {
        "fused": lambda: ours(FUSED),
        "loop_fused": lambda: loop(peers, (1.0, 1.0, -1.0), on_device),
        "base": lambda: ours(PLAIN),
        "loop_base": lambda: loop(peers[:1], (1.0,), on_device),
        "single_fused": lambda: loop(peers, (1.0, 1.0, -1.0), on_device[:1]),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(settings.rounds):
        for name, measure in contestants.items():
            progress(f"{sampling}, batch {batch}, round {number + 1} of {settings.rounds}: {name}")
            speeds[name].append(1.0 / measure())
    spread = max((max(found) - min(found)) / median(found) for found in speeds.values())
    medians = {name: median(found) for name, found in speeds.items()}
    return BenchRow(batch, **medians, sampling=sampling, spread=spread)


def _steps(engine: Engine) -> Iterator[None]:
    while engine.has_work:
        engine.step()
        yield


def _timed(work: Callable[[], object]) -> float:
    started = perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - started


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "device": f"{device.type}: {name}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
