"""The torch backend behind `proxyserve_kernels.backend.Backend`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from proxyserve_kernels.backend import BackendName, Needs
from proxyserve_kernels.controls import PickControls, Picks
from proxyserve_kernels.entropy import temperatures_for
from proxyserve_kernels.rows import RowBatch
from proxyserve_kernels.speculation import Drafts, Verdicts, VerifyRule
from proxyserve_kernels.tilt import Moments, PairDivergences, Solution, SolveControls, Tilt
from proxyserve_kernels.torch_backend.pick import pick
from proxyserve_kernels.torch_backend.scores import fuse
from proxyserve_kernels.torch_backend.solve import solve
from proxyserve_kernels.torch_backend.tilt import moments, pair_divergences, tilt
from proxyserve_kernels.torch_backend.verify import verify


class TorchBackend:
    """Eager torch on any device. Nothing is compiled, so `compilations` is always 0."""

    name: BackendName = "torch"
    compilations = 0

    def warm_up(self, needs: Needs, progress: Callable[[str], None] = lambda _: None) -> None:
        """Nothing to do; see `Backend`."""

    def fused_scores(self, batch: RowBatch) -> Tensor:
        """See `Backend`."""
        return fuse(batch, compare=False).scores

    def pick(self, batch: RowBatch, controls: PickControls) -> Picks:
        """See `Backend`."""
        return pick(batch, controls)

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

    def temperatures(self, batch: RowBatch, entropies: Tensor) -> Tensor:
        """See `Backend`."""
        return temperatures_for(self.fused_scores(batch), entropies)

    def verify(
        self, batch: RowBatch, controls: PickControls, drafts: Drafts, rule: VerifyRule = "rejection"
    ) -> Verdicts:
        """See `Backend`."""
        return verify(batch, controls, drafts, rule)
