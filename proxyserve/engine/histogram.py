"""Counts of values by size, for metrics. Prometheus' own client is not known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


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


class _State(NamedTuple):
    counts: NDArray[np.int64]
    total: float


class Histogram:
    """Written by one thread; `stats` may be called from any, and never sees half of an observation."""

    def __init__(self, bounds: Sequence[float]) -> None:
        if not bounds or list(bounds) != sorted(set(bounds)):
            raise ValueError(f"bounds must rise, these do not: {list(bounds)}")
        self.bounds = tuple(map(float, bounds))
        self._edges = np.array(self.bounds)
        self._state = _State(np.zeros(len(self.bounds) + 1, np.int64), 0.0)

    def observe(self, *values: float) -> None:
        self.observe_all(values)

    def observe_all(self, values: Sequence[float]) -> None:
        """Several values at the price of about one."""
        if values:
            places = np.searchsorted(self._edges, values)
            counts = self._state.counts + np.bincount(places, minlength=len(self.bounds) + 1)
            self._state = _State(counts, self._state.total + sum(values))

    def stats(self) -> HistogramStats:
        counts, total = self._state
        return HistogramStats(self.bounds, tuple(counts.tolist()), total)
