"""The Triton backend behind `proxyserve_kernels.backend.Backend`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from proxyserve_kernels.backend import BackendName, Needs
from proxyserve_kernels.controls import PickControls, Picks
from proxyserve_kernels.rows import RowBatch
from proxyserve_kernels.speculation import Drafts, Verdicts, VerifyRule, emitted, settle
from proxyserve_kernels.tilt import Moments, PairDivergences, Solution, SolveControls, Tilt
from proxyserve_kernels.triton_backend.compilations import compiled_variants
from proxyserve_kernels.triton_backend.launch import interpreted, write_scores
from proxyserve_kernels.triton_backend.results import read_picks
from proxyserve_kernels.triton_backend.run import prepared_table, run
from proxyserve_kernels.triton_backend.solve import moments, pair_divergences, solve, tilt
from proxyserve_kernels.triton_backend.verify import judge
from proxyserve_kernels.triton_backend.warmup import warm_up


class TritonBackend:
    """Triton kernels on one CUDA device, or in Triton's interpreter on the CPU for tests.

    Raises ValueError for a device that is neither.
    """

    name: BackendName = "triton"

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" and not interpreted():
            raise ValueError(f"Kernel backend 'triton' needs a CUDA device, not {device}; use 'torch'.")
        self.device = device
        self._warm = 0

    def warm_up(self, needs: Needs, progress: Callable[[str], None] = lambda _: None) -> None:
        """See `Backend`. In the interpreter there is nothing to compile."""
        if interpreted():
            return
        warm_up(self.device, needs, progress)
        self._warm = compiled_variants()

    @property
    def compilations(self) -> int:
        """See `Backend`."""
        return compiled_variants() - self._warm

    def fused_scores(self, batch: RowBatch) -> Tensor:
        """See `Backend`."""
        return write_scores(prepared_table(batch, None))

    def pick(self, batch: RowBatch, controls: PickControls) -> Picks:
        """See `Backend`."""
        table, buffers, wishes = run(batch, controls)
        return read_picks(table, buffers, controls, wishes)

    def tilt(self, batch: RowBatch, multipliers: Tensor) -> Tilt:
        """See `Backend`."""
        return tilt(batch, multipliers)

    def pair_divergences(self, batch: RowBatch) -> PairDivergences:
        """See `Backend`."""
        return pair_divergences(batch)

    def moments(self, batch: RowBatch) -> Moments:
        """See `Backend`."""
        return moments(batch)

    def solve(self, batch: RowBatch, controls: SolveControls) -> Solution:
        """See `Backend`."""
        return solve(batch, controls)

    def verify(
        self, batch: RowBatch, controls: PickControls, drafts: Drafts, rule: VerifyRule = "rejection"
    ) -> Verdicts:
        """See `Backend`."""
        accepted, tokens, good = settle(drafts, *judge(batch, controls, drafts, rule))
        told = replace(controls, forced=emitted(drafts, tokens, batch.size))
        return Verdicts(accepted, tokens, good, self.pick(batch, told))
