"""Counts of values by size, for metrics. Prometheus' own client is not known here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HistogramStats:
    """A snapshot. `counts[i]` is the number of values up to `bounds[i]` and above the bound before it; the last one,
    which has no bound, is that of all larger values. `total` is the sum of the values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        return sum(self.counts)


class Histogram:
    """Written by one thread; `stats` may be called from any, and never sees half of an observation."""

    def __init__(self, bounds: Sequence[float]) -> None:
        if not bounds or list(bounds) != sorted(set(bounds)):
            raise ValueError(f"bounds must rise, these do not: {list(bounds)}")
        self.bounds = tuple(map(float, bounds))
        self._state = [0] * (len(bounds) + 1), 0.0  # replaced, never changed

    def observe(self, value: float) -> None:
        self.observe_all((value,))

    def observe_all(self, values: Sequence[float]) -> None:
        """For the values of a batch this is no slower than numpy, which must convert them."""
        if values:
            counts, total = self._state
            counts = counts.copy()
            for value in values:
                counts[bisect_left(self.bounds, value)] += 1
            self._state = counts, total + sum(values)

    def stats(self) -> HistogramStats:
        counts, total = self._state
        return HistogramStats(self.bounds, tuple(counts), total)
