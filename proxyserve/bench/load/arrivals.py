"""When requests arrive that do not wait for each other."""

from __future__ import annotations

from itertools import accumulate
from random import Random


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """The times of `count` arrivals, in seconds from the start, at `rate` per second in the mean: gaps are exponential
    and independent. The same for the same arguments."""
    random = Random(f"arrivals/{seed}")
    return list(accumulate(random.expovariate(rate) for _ in range(count)))
