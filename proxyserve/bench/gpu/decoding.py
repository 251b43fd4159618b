"""Decoding steps of an engine, timed: many requests, all of the same length, in one way of decoding after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from statistics import median
from time import perf_counter

import torch

from proxyserve.bench.gpu.models import EXPERT
from proxyserve.engine.engine import Engine
from proxyserve.engine.runner import Runner
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.fusion.fusion import Fusion, proxy
from proxyserve.types import SamplingParams

#: Steps before the clock starts.
_WARM = 4
_SEED = 0


@dataclass(frozen=True, slots=True)
class Way:
    """One way of decoding: with the expert or the base alone, with recorded steps or not, with so many drafts."""

    name: str
    fused: bool
    recorded: bool
    drafts: int = 0


@dataclass(frozen=True, slots=True)
class Steps:
    """Median seconds of a step in the first half and in the second, and tokens per step and request."""

    first: float
    second: float
    tokens: float

    @property
    def seconds(self) -> float:
        return (self.first + self.second) / 2

    @property
    def spread(self) -> float:
        """How far the halves are apart, in percent."""
        return 100 * abs(self.first - self.second) / self.seconds


class Decoding:
    """Requests of `prompt` tokens to one engine. Prompts are the same every time, so that the prefix cache has them
    from the second time on."""

    def __init__(self, engine: Engine, vocabulary: int, prompt: int, most_tokens: int) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._prompt = prompt
        self._most_tokens = most_tokens
        self._names = count()

    def time(self, way: Way, batch: int, steps: int) -> Steps:
        """`steps` steps of `batch` requests. The engine has nothing else to do."""
        engine = self._engine
        with self._as(way):
            keys = self._submit(way, batch)
            got = dict.fromkeys(keys, 0)
            while not all(got.values()):
                self._step(got)
            for _ in range(_WARM):
                self._step(got)
            before, seconds = sum(got.values()), []
            for _ in range(steps):
                started = perf_counter()
                self._step(got)
                seconds.append(perf_counter() - started)
            tokens = sum(got.values()) - before
            for key in keys:
                engine.cancel(key)
        half = steps // 2
        return Steps(median(seconds[:half]), median(seconds[half:]), tokens / steps / batch)

    def text(self, way: Way, batch: int) -> list[list[int]]:
        """What the requests get, a few tokens each."""
        with self._as(way):
            got: dict[str, list[int]] = {key: [] for key in self._submit(way, batch)}
            while not all(len(ids) > 2 * _WARM for ids in got.values()):
                for event in self._engine.step():
                    got[f"{event.request_id}/{event.index}"].extend(event.token_ids)
            for key in got:
                self._engine.cancel(key)
        return [ids[: 2 * _WARM] for ids in got.values()]

    def _submit(self, way: Way, batch: int) -> list[str]:
        generator = torch.Generator().manual_seed(_SEED)
        ids = torch.randint(1, self._vocabulary, (batch, self._prompt), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=self._most_tokens, temperature=0.0, ignore_eos=True)
        fusion = proxy({EXPERT: 1.0}) if way.fused else Fusion()
        return [
            key
            for prompt in ids
            for key in self._engine.submit(
                Submission(f"gpu-{next(self._names)}", LanePrompts(tuple(prompt)), sampling, fusion)
            )
        ]

    def _step(self, got: dict[str, int]) -> None:
        for event in self._engine.step():
            if event.finish_reason is not None:
                raise RuntimeError(f"a request ended early: {event.finish_reason} {event.error or ''}")
            got[f"{event.request_id}/{event.index}"] += len(event.token_ids)

    @contextmanager
    def _as(self, way: Way) -> Iterator[None]:
        """Have the engine decode that way."""
        engine = self._engine
        graphs, speculate = engine.graphs, engine.speculator.speculate
        runners = [runner for runner in engine.runners.values() if isinstance(runner, Runner)]
        known = [runner.graphs for runner in runners]
        engine.speculator.speculate = way.drafts or "off"
        if not way.recorded:
            engine.graphs = None
            for runner in runners:
                runner.graphs = None
        try:
            yield
        finally:
            engine.graphs, engine.speculator.speculate = graphs, speculate
            for runner, before in zip(runners, known, strict=True):
                runner.graphs = before
