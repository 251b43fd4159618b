"""The sections, in the order of what matters most, and the time that each may take."""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from proxyserve.bench.gpu.attention import measure_attention
from proxyserve.bench.gpu.decoding import Decoding, Steps, Way
from proxyserve.bench.gpu.floor import Floor, Reads, expected_tokens
from proxyserve.bench.gpu.models import EXPERT, PAIRS, TINY, Pair, make_models
from proxyserve.config import EngineConfig
from proxyserve.engine.cuda.graph_device import GraphDevice
from proxyserve.engine.engine import Engine
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.loading import Placement
from proxyserve_kernels.bench.report import Report
from proxyserve_kernels.bench.timing import GraphClock, HostClock

#: Seconds after which no new measurement begins. With the sections of the kernels that `make bench-gpu` asks for, all
#: is over before eight minutes are.
LIMIT = 230.0
#: What making a large pair and its engine may take: with less left none is begun.
_PAIR_SECONDS = 60.0
#: Of the goals: a fused step beside its floor, and drafts beside the base alone.
MOST_OVER_FLOOR, LEAST_OF_BASE = 1.05, 1.0
#: Drafts of each request, by the number of requests.
DRAFTS = {1: 4, 64: 2}
_ACCEPTANCES = (0.6, 0.8)
#: Of a device's memory, for weights; the rest is for KV and recordings.
_WEIGHTS_SHARE = 0.6

FUSED, DRAFTED = "fused, recorded", "fused, recorded, drafts"


@dataclass
class GpuBench:
    """`context` tokens per request before the first step. `rate`: bytes per second that a large copy moves."""

    report: Report
    device: torch.device
    graph_device: GraphDevice | None
    pairs: Mapping[str, Pair]
    batches: tuple[int, ...]
    context: int
    steps: int
    limit: float = LIMIT
    started: float = field(default_factory=time.monotonic)
    rate: float = 0.0

    @property
    def left(self) -> float:
        """Seconds until nothing new begins."""
        return self.limit - (time.monotonic() - self.started)

    @property
    def over(self) -> bool:
        return self.left < 0.0

    def run(self) -> None:
        """All of it. A pair that fails is reported, and the next one begins."""
        self._measure_rate()
        if self.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            self._try("attention", self._measure_attention)
        for name, pair in self.pairs.items():
            if not self._fits(pair):
                self.report.progress(f"{name} does not fit into this device's memory")
                continue
            if self.left < _PAIR_SECONDS:
                self.report.failed.append(f"{name}: no time left")
                continue
            self._try(name, partial(self._measure, name, pair))
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _try(self, name: str, section: Callable[[], None]) -> None:
        try:
            section()
        except Exception as error:  # the other sections must still run
            self.report.progress(traceback.format_exc())
            self.report.failed.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])

    def _fits(self, pair: Pair) -> bool:
        if self.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        return pair.bytes(torch.bfloat16.itemsize) < _WEIGHTS_SHARE * free

    def _measure_rate(self) -> None:
        """Of a copy, counting bytes read and written: what the floor is computed with."""
        cuda = self.device.type == "cuda"
        source = torch.ones(2**32 if cuda else 2**22, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        seconds = []
        for _ in range(5):
            self._wait()
            started = time.perf_counter()
            target.copy_(source)
            self._wait()
            seconds.append(time.perf_counter() - started)
        self.rate = 2 * source.numel() / min(seconds)
        with self.report.table("copy") as rows:
            rows.append({"bytes moved": 2 * source.numel(), "GB/s": self.rate / 1e9})

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _measure_attention(self) -> None:
        cuda = self.device.type == "cuda"
        dtype = torch.bfloat16 if cuda else torch.float32
        clock = GraphClock() if cuda else HostClock(1)
        measure_attention(self.report, clock, self.pairs, self.batches, self.context, self.device, dtype)

    # One pair ------------------------------------------------------------------------------------------------

    def _measure(self, name: str, pair: Pair) -> None:
        cuda = self.device.type == "cuda"
        placement = Placement(self.device, torch.bfloat16 if cuda else torch.float32)
        # Room for what every step of every way puts behind the prompt.
        longest = 2 * self.context + 64 * (1 + max(DRAFTS.values()))
        self.report.progress(f"{name}: making the models")
        models = make_models(pair, placement, longest)
        expert = models.experts[EXPERT]
        assert isinstance(models.base, LoadedModel)
        assert expert.untuned is not None
        floor = Floor(*(Reads.of(model) for model in (models.base, expert.tuned, expert.untuned)))
        config = EngineConfig(
            max_batch=max(self.batches),
            max_batch_tokens=8192 if cuda else 64,
            kv_memory=None if cuda else 2**24,
            speculate=max(DRAFTS.values()),
            pairs="apart",
        )
        self.report.progress(f"{name}: recording steps")
        started = time.perf_counter()
        engine = Engine(models, config, graph_device=self.graph_device)
        self.report.progress(f"{name}: an engine in {time.perf_counter() - started:.1f} s")
        decoding = Decoding(engine, pair.vocabulary, self.context, longest - self.context)
        for batch in self.batches:
            if self.over:
                self.report.failed.append(f"{name}, {batch} requests: no time left")
                return
            self._check_texts(name, decoding, batch)
            self._measure_batch(name, decoding, floor, batch)
        if cuda:
            self._report_memory(name, engine)

    def _ways(self, batch: int) -> list[Way]:
        drafts = DRAFTS.get(batch, min(DRAFTS.values()))
        ways = [Way("base alone", fused=False, recorded=False), Way("fused", fused=True, recorded=False)]
        if self.graph_device is not None or self.device.type == "cuda":
            ways += [
                Way("base alone, recorded", fused=False, recorded=True),
                Way(FUSED, fused=True, recorded=True),
                Way(DRAFTED, fused=True, recorded=True, drafts=drafts),
            ]
        return ways

    def _measure_batch(self, name: str, decoding: Decoding, floor: Floor, batch: int) -> None:
        found: dict[str, Steps] = {}
        with self.report.table(
            f"{name}, {batch} requests of {self.context} tokens",
            "the floor is what bytes and operations must take at the speed of a copy",
        ) as rows:
            for way in self._ways(batch):
                if self.over:
                    self.report.failed.append(f"{name}, {batch} requests, {way.name}: no time left")
                    break
                self.report.progress(f"{name}, {batch} requests: {way.name}")
                steps = found[way.name] = decoding.time(way, batch, self.steps)
                least = self._floor_of(way, floor, batch)
                rows.append(
                    {
                        "decoding": way.name,
                        "step ms": 1e3 * steps.seconds,
                        "spread %": steps.spread,
                        "floor ms": 1e3 * least,
                        "step / floor": steps.seconds / least,
                        "tokens per step": steps.tokens,
                        "tokens/s": batch * steps.tokens / steps.seconds,
                    }
                )
        self._goals(f"{name}, {batch} requests", found, floor, batch)

    def _floor_of(self, way: Way, floor: Floor, batch: int) -> float:
        if not way.fused:
            return floor.alone(batch, self.context, self.rate)
        if way.drafts:
            return floor.drafted(batch, self.context, self.rate, way.drafts)
        return floor.fused(batch, self.context, self.rate)

    def _goals(self, title: str, found: Mapping[str, Steps], floor: Floor, batch: int) -> None:
        """Acceptance is about 1 here; a smaller one would have the same steps, and fewer tokens of each."""
        goal = self.report.goal
        if FUSED in found:
            over = found[FUSED].seconds / floor.fused(batch, self.context, self.rate)
            goal(f"{title}: fused step / floor", f"<= {MOST_OVER_FLOOR}", over, "x", over <= MOST_OVER_FLOOR)
        if DRAFTED not in found:
            return
        base = found["base alone, recorded"].seconds
        drafts = DRAFTS.get(batch, min(DRAFTS.values()))
        for acceptance in _ACCEPTANCES:
            speed = expected_tokens(acceptance, drafts) * base / found[DRAFTED].seconds
            what = f"{title}: {drafts} drafts, if {acceptance:g} of them stood, / base alone"
            goal(what, f">= {LEAST_OF_BASE}", speed, "x", speed >= LEAST_OF_BASE)

    def _check_texts(self, name: str, decoding: Decoding, batch: int) -> None:
        """Recorded steps give the text that others give. In bfloat16 near-ties may fall otherwise, and texts part."""
        recorded = [way for way in self._ways(batch) if way.recorded and way.fused and not way.drafts]
        for way in recorded:
            plain = Way("", fused=True, recorded=False)
            pairs = zip(decoding.text(way, batch), decoding.text(plain, batch), strict=True)
            same = sum(mine == other for mine, other in pairs)
            self.report.progress(f"{name}, {batch} requests: {same} of {batch} texts alike")
            self.report.check(2 * same >= batch, f"{name}: only {same} of {batch} texts alike when replayed")

    def _report_memory(self, name: str, engine: Engine) -> None:
        planned = engine.residents.bytes
        peak = torch.cuda.max_memory_allocated(self.device)
        self.report.goal(
            f"{name}: memory at its peak / weights and KV",
            "<= 1.1",
            peak / planned,
            "x",
            peak <= 1.1 * planned,
        )


def standard(
    report: Report, device: torch.device, graph_device: GraphDevice | None, limit: float
) -> GpuBench:
    """The sizes of a GPU, or, on a CPU, some that only show that everything runs."""
    if device.type == "cuda":
        return GpuBench(report, device, graph_device, PAIRS, (1, 64), 1024, 24, limit)
    return GpuBench(report, device, graph_device, TINY, (1, 2), 12, 4, limit)
