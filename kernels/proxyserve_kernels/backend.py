"""The one signature that both backends have, and the choice between them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from proxyserve_kernels.controls import PickControls, Picks
from proxyserve_kernels.rows import RowBatch
from proxyserve_kernels.speculation import Drafts, Verdicts, VerifyRule
from proxyserve_kernels.tilt import Moments, PairDivergences, Solution, SolveControls, Tilt

BackendName = Literal["torch", "triton"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What batches will hold, for a warm-up: sources of `dtypes`, alone and mixed; ids below `vocabulary`; up to `rows`
    rows with up to `terms` terms; lists of up to `listed` tokens. With `rules` also rows with rules, and up to `laws`
    support laws; with `uncompared` also picks without `compare`; with `dynamic` also `solve`; with `speculation` also
    `verify`. `fused_scores` and `moments` are compiled when they are first used."""

    dtypes: tuple[torch.dtype, ...]
    vocabulary: int
    rows: int
    terms: int = 1
    listed: int = 0
    rules: bool = False
    laws: int = 0
    uncompared: bool = False
    dynamic: bool = False
    speculation: bool = False


class Backend(Protocol):
    """Batched logit arithmetic. Every method takes a mixed batch, reads only its rows, and returns tensors on its
    device; a row that holds a NaN or +inf is flagged or NaN in its own results and touches no other."""

    name: BackendName

    def warm_up(self, needs: Needs, progress: Callable[[str], None] = lambda _: None) -> None:
        """Compile what batches within `needs` can use. `progress` gets a line of text now and then."""

    @property
    def compilations(self) -> int:
        """Kernels compiled since `warm_up`, or since the start. Stays 0 after a complete warm-up."""

    def fused_scores(self, batch: RowBatch) -> Tensor:
        """Fused scores before adjustments, written out: float32 [B, batch.width], -inf from each row's width on."""

    def pick(self, batch: RowBatch, controls: PickControls) -> Picks:
        """Fuse, adjust, filter and draw one token per row."""

    def tilt(self, batch: RowBatch, multipliers: Tensor) -> Tilt:
        """A(a), A', A'', A''' of each row at `multipliers` float32 [B, G]."""

    def pair_divergences(self, batch: RowBatch) -> PairDivergences:
        """KL divergences between the two rows of every term."""

    def moments(self, batch: RowBatch) -> Moments:
        """Gradient and covariance of the terms' deltas, at most 4 terms. ValueError for more."""

    def solve(self, batch: RowBatch, controls: SolveControls) -> Solution:
        """Multipliers of the rows' weights from KL divergences."""

    def temperatures(self, batch: RowBatch, entropies: Tensor) -> Tensor:
        """Temperatures float32 [B] at which each row's fused law, before adjustments, has entropy `entropies` (float32
        [B], host, in nats; NaN for rows that do not ask, whose result is NaN). Targets that no temperature reaches give
        the nearest of `entropy.MIN_TEMPERATURE` and `entropy.MAX_TEMPERATURE`."""

    def verify(
        self, batch: RowBatch, controls: PickControls, drafts: Drafts, rule: VerifyRule = "rejection"
    ) -> Verdicts:
        """Accept or replace drafted tokens. ValueError if rejection lacks the drafts' laws."""


def backend_for(device: torch.device | str, name: BackendName | Literal["auto"] = "auto") -> Backend:
    """The backend `name`, or for "auto" triton on a CUDA device that has it and torch elsewhere.

    Raises ValueError for an unknown name, or for "triton" without a CUDA device or without the triton package.
    """
    cuda = torch.device(device).type == "cuda"
    installed = importlib.util.find_spec("triton") is not None
    if name == "auto":
        name = "triton" if cuda and installed else "torch"
    if name == "torch":
        from proxyserve_kernels.torch_backend.backend import TorchBackend

        return TorchBackend()
    if name != "triton":
        raise ValueError(f"There is no kernel backend '{name}'; choose auto, torch or triton.")
    if not installed:
        raise ValueError("Kernel backend 'triton' needs the triton package: pip install 'proxyserve[gpu]'.")
    from proxyserve_kernels.triton_backend.backend import TritonBackend

    return TritonBackend(torch.device(device))
