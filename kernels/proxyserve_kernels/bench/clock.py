"""Time of short GPU work: replays of a captured graph between two events, the median of many."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


class Clock:
    """Measures on one device. `repeats` is how many times each function is timed.

    On a CPU, which serves only to try the benchmark itself in Triton's interpreter, it calls the functions directly."""

    def __init__(self, device: torch.device, repeats: int = 60) -> None:
        self.device = device
        self.repeats = repeats if device.type == "cuda" else 1

    def microseconds(self, functions: Sequence[Callable[[], object]], *, graph: bool = True) -> float:
        """Median time of one call. Several functions, which do the same on other data, take turns, so that caches hold
        what they would hold in serving: nothing of the call's own inputs. `graph` False for what cannot be captured."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for function in functions:
                function()
            return 1e6 * (time.perf_counter() - start) / len(functions)
        calls = [self._captured(function) if graph else function for function in functions]
        for call in calls:
            call()
        times = []
        for number in range(max(self.repeats, len(calls))):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            calls[number % len(calls)]()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end))
        return statistics.median(times)

    def _captured(self, function: Callable[[], object]) -> Callable[[], object]:
        """The function as a graph, after a call outside of it that compiles what there is to compile."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay
