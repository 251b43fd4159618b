"""The Triton backend behind `proxyserve_kernels.backend.Backend`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from proxyserve_kernels.backend import BackendName, Needs
from proxyserve_kernels.controls import PickControls, Picks
from proxyserve_kernels.entropy import temperatures_for
from proxyserve_kernels.rows import RowBatch
from proxyserve_kernels.speculation import Drafts, Verdicts, VerifyRule, emitted, settle
from proxyserve_kernels.tilt import Moments, PairDivergences, Solution, SolveControls, Tilt
from proxyserve_kernels.triton_backend.compilations import compiled_variants
from proxyserve_kernels.triton_backend.launch import interpreted, write_scores
from proxyserve_kernels.triton_backend.results import read_picks
from proxyserve_kernels.triton_backend.run import prepared_table, run
from proxyserve_kernels.triton_backend.solve import moments, pair_divergences, solve, tilt
from proxyserve_kernels.triton_backend.tuning import ROOM
from proxyserve_kernels.triton_backend.verify import judge
from proxyserve_kernels.triton_backend.warmup import warm_up


class TritonBackend:
    """Triton kernels on one CUDA device, or in Triton's interpreter on the CPU for tests.

    A row has at most 8 terms and 4 support laws, a list at most `room` tokens; `room`, a power of two, is how many of a
    row's best tokens are sorted. Raises ValueError for a device that is neither.
    """

    name: BackendName = "triton"

    def __init__(self, device: torch.device, room: int = ROOM) -> None:
        if device.type != "cuda" and not interpreted():
            raise ValueError(f"Kernel backend 'triton' needs a CUDA device, not {device}; use 'torch'.")
        self.device = device
        self.room = room
        self._warm = 0

    def _here(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, whatever its arguments are on."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def warm_up(self, needs: Needs, progress: Callable[[str], None] = lambda _: None) -> None:
        """See `Backend`. In the interpreter there is nothing to compile."""
        if interpreted():
            return
        with self._here():
            warm_up(self.device, needs, progress)
        self._warm = compiled_variants()

    @property
    def compilations(self) -> int:
        """See `Backend`."""
        return compiled_variants() - self._warm

    def fused_scores(self, batch: RowBatch) -> Tensor:
        """See `Backend`."""
        with self._here():
            return write_scores(prepared_table(batch, None))

    def pick(self, batch: RowBatch, controls: PickControls) -> Picks:
        """See `Backend`."""
        with self._here():
            table, buffers, wishes = run(batch, controls, room=self.room)
            return read_picks(table, buffers, controls, wishes)

    def tilt(self, batch: RowBatch, multipliers: Tensor) -> Tilt:
        """See `Backend`."""
        with self._here():
            return tilt(batch, multipliers)

    def pair_divergences(self, batch: RowBatch) -> PairDivergences:
        """See `Backend`."""
        with self._here():
            return pair_divergences(batch)

    def moments(self, batch: RowBatch) -> Moments:
        """See `Backend`."""
        with self._here():
            return moments(batch)

    def solve(self, batch: RowBatch, controls: SolveControls) -> Solution:
        """See `Backend`."""
        with self._here():
            return solve(batch, controls)

    def temperatures(self, batch: RowBatch, entropies: Tensor) -> Tensor:
        """See `Backend`."""
        return temperatures_for(self.fused_scores(batch), entropies)

    def verify(
        self, batch: RowBatch, controls: PickControls, drafts: Drafts, rule: VerifyRule = "rejection"
    ) -> Verdicts:
        """See `Backend`. Reads nothing back, unless log-probs are asked for: those are of the emitted tokens."""
        with self._here():
            accepted, drawn, picks = judge(batch, controls, drafts, rule)
            accepted, tokens, good = settle(drafts, accepted, drawn, picks.valid)
            if controls.reports:
                picks = self.pick(batch, replace(controls, forced=emitted(drafts, tokens, batch.size)))
            return Verdicts(accepted, tokens, good, picks)
