"""What all GPU sections share: the device, the sizes, the clock and the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from proxyserve_kernels import PickControls
from proxyserve_kernels.bench.report import Report
from proxyserve_kernels.bench.rotation import COLD, Pools, Rotation, sets_needed
from proxyserve_kernels.bench.timing import Clock
from proxyserve_kernels.triton_backend.backend import TritonBackend

#: Seconds that the whole run may take. Sections look at the time between two measurements.
LIMIT = 450.0

#: Sizes at which the goals stand.
VOCABULARY = 128_256


@dataclass
class Bench:
    """`dry`: in the interpreter, to see that everything runs; figures mean nothing and sizes are tiny. `backend` is
    Triton's. `vocabularies` and `batches` are those of the sweep, `vocabulary` that of everything else. `warm`: the
    backend was warmed up for bf16 and one pair. `copy_rate`: bytes per second, once measured."""

    report: Report
    device: torch.device
    clock: Clock
    backend: TritonBackend
    vocabularies: list[int]
    batches: list[int]
    vocabulary: int
    dry: bool
    started: float = field(default_factory=time.monotonic)
    deadline: float = 0.0
    copy_rate: float = 0.0
    warm: bool = False

    def __post_init__(self) -> None:
        self.pools = Pools(self.device)

    def begin(self, cap: float) -> None:
        """A section that may take `cap` seconds begins."""
        self.deadline = math.inf if self.dry else min(time.monotonic() + cap, self.started + LIMIT)

    def over(self) -> bool:
        """Whether the section's time is up."""
        return time.monotonic() >= self.deadline

    def rotation(
        self,
        batch: int,
        vocabulary: int,
        dtype: torch.dtype,
        terms: int,
        asked: Callable[[int], PickControls],
        *,
        shape: str = "mid",
        cold: float = COLD,
    ) -> Rotation:
        """Batches to rotate through. The pool is made for the largest batch at once, so that it is made once."""
        count = 1 + 2 * terms
        needed = {
            size: size * (1 if self.dry else sets_needed(size, vocabulary, dtype, count, cold))
            for size in {batch, *self.batches}
        }
        sources = self.pools.sources(max(needed.values()), vocabulary, dtype, count, shape)
        return Rotation(sources, batch, terms, needed[batch] // batch, asked)
