"""Two clocks with one signature: functions race, that is, they take turns in two passes, so that every ratio comes from
one run and every figure has been seen twice."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Function = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one call in the first and in the second pass. `graphed`: replayed from a CUDA graph."""

    first: float
    second: float
    graphed: bool = False

    @property
    def seconds(self) -> float:
        return (self.first + self.second) / 2

    @property
    def ms(self) -> float:
        return 1e3 * self.seconds

    @property
    def us(self) -> float:
        return 1e6 * self.seconds

    @property
    def spread(self) -> float:
        """How far the passes are apart, in percent."""
        return 100 * abs(self.first - self.second) / self.seconds

    def over(self, other: Timing) -> Ratio:
        """How many times as long as `other` this takes."""
        return Ratio(
            self.seconds / other.seconds,
            min(self.first / other.first, self.second / other.second),
            max(self.first / other.first, self.second / other.second),
        )


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of both passes together, and the lower and the higher of the two."""

    value: float
    low: float
    high: float


class Clock(Protocol):
    def race(
        self, functions: Mapping[str, Function], *, calls: int = 1, graph: bool = True
    ) -> dict[str, Timing]:
        """Time the functions, each of which makes `calls` calls; a Timing is of one call. `graph` False: as called,
        with all that the host does."""


class HostClock:
    """perf_counter: for a CPU. `rounds` turns per pass."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def race(
        self, functions: Mapping[str, Function], *, calls: int = 1, graph: bool = True
    ) -> dict[str, Timing]:
        """See `Clock`."""
        for function in functions.values():
            function()
        passes: list[dict[str, float]] = []
        for _ in range(2):
            taken: dict[str, list[float]] = {name: [] for name in functions}
            for _ in range(self.rounds):
                for name, function in functions.items():
                    begin = time.perf_counter()
                    function()
                    taken[name].append(time.perf_counter() - begin)
            passes.append({name: statistics.median(values) / calls for name, values in taken.items()})
        return {name: Timing(passes[0][name], passes[1][name]) for name in functions}


class GraphClock:
    """CUDA events around graph replays, at least 25 per pass; slow ones at least 5 (`LIMIT`)."""

    #: Replays of a pass, and the seconds after which it has enough of a slow function.
    REPLAYS = 25
    LIMIT = 0.25

    def race(
        self, functions: Mapping[str, Function], *, calls: int = 1, graph: bool = True
    ) -> dict[str, Timing]:
        """See `Clock`. A function that cannot be captured is timed as called, and its Timing says so."""
        ready = {name: self._prepare(function, graph) for name, function in functions.items()}
        passes = [{name: self._median(run) for name, (run, _) in ready.items()} for _ in range(2)]
        return {
            name: Timing(passes[0][name] / calls, passes[1][name] / calls, graphed)
            for name, (_, graphed) in ready.items()
        }

    def _prepare(self, function: Function, graph: bool) -> tuple[Function, bool]:
        """What to time, warmed up, and whether it is a graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # where capturing wants the first calls to have been
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if not graph:
            return function, False
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                function()
        except RuntimeError:
            torch.cuda.synchronize()
            return function, False
        captured.replay()
        torch.cuda.synchronize()
        return captured.replay, True

    def _median(self, run: Function) -> float:
        """Seconds. Replays are queued without waiting in between, so that the device never waits for the host."""
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        once = time.perf_counter() - begin
        replays = max(5, min(self.REPLAYS, int(self.LIMIT / max(once, 1e-6))))
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(replays)
        ]
        for start, end in pairs:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3
