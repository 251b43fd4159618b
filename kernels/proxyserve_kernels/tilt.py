"""Dynamic weights: how far to go along a delta, solved per row from KL divergences.

With P = softmax(base), d = sum of weight_i * (positive_i - negative_i) and a >= 0, the tilted law is
P_a(x) = P(x) exp(a d(x)) / Z(a), and everything follows from its log-partition and that function's derivatives:

    A(a) = log E_P[exp(a d)]      A'(a) = E_a[d]      A''(a) = Var_a[d]      A'''(a) = E_a[(d - A')^3]
    forward(a) = KL(P_a || P) = a A'(a) - A(a)        forward' = a A''(a)
    reverse(a) = KL(P || P_a) = A(a) - a A'(0)        reverse' = A'(a) - A'(0)

Both grow with a. Dynamic logit fusion (Fan et al. 2024, arXiv 2406.15480) moves the fused law as far from the base as
the tuned model moved from the untuned one: forward = KL(positive || negative), reverse = KL(negative || positive).
With several terms those targets are their means weighted by |weight_i|.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from proxyserve_kernels.rows import RowBatch

#: The multipliers that `Match.PAPER` tries.
PAPER_GRID = tuple(point / 10 for point in range(21))


class Match(IntEnum):
    """What a row's multiplier is solved for."""

    #: The row keeps its weights.
    NONE = 0
    #: forward(a) equals its target.
    FORWARD = 1
    #: reverse(a) equals its target.
    REVERSE = 2
    #: The least (forward - target)^2 + (reverse - target)^2, the published objective, without its grid.
    BOTH = 3
    #: The largest a with forward(a) <= `budget`.
    BUDGET = 4
    #: The published search: a in 0.0, 0.1 .. 2.0 for one term at a time (the others 0), least objective of BOTH summed
    #: over all terms' targets; ties go to the first term and the lowest a. The row's weights are not used.
    PAPER = 5


@dataclass(frozen=True, slots=True, eq=False)
class SolveControls:
    """Host tensors with one entry per row: `match` int64 (values of `Match`), `max_weight` float32 (the largest
    multiplier, > 0; PAPER searches to 2.0 whatever it says), `budget` float32 in nats (used by BUDGET)."""

    match: Tensor
    max_weight: Tensor
    budget: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Tensors on the device of the logits. `weights` float32 [B, T]: the batch's weights times the row's multiplier
    (PAPER: the found weight of one term, 0 for the others). `multiplier` float32 [B]: 1 for rows of NONE, the found
    weight for PAPER. `forward` and `reverse` float32 [B]: the divergences in nats at the solution (0 for NONE).
    `converged` bool [B]: False where `max_weight` was reached first, the row holds a NaN, or the steps ran out."""

    weights: Tensor
    multiplier: Tensor
    forward: Tensor
    reverse: Tensor
    converged: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tilt:
    """A and its first three derivatives, float32 [B, G] each, at G multipliers per row."""

    log_partition: Tensor
    mean: Tensor
    variance: Tensor
    third: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PairDivergences:
    """float32 [B, T] in nats: `forward` KL(positive || negative), `reverse` KL(negative || positive); 0 where a row
    has no such term or it has no negative."""

    forward: Tensor
    reverse: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Of the terms' deltas D under P_w, w the batch's weights: `log_partition` A(w) = log E_P[exp(w . D)] float32 [B],
    `gradient` E_w[D] float32 [B, T], `covariance` Cov_w[D] float32 [B, T, T]. Unused terms are 0."""

    log_partition: Tensor
    gradient: Tensor
    covariance: Tensor


#: What solves some rows: of a batch of only those, and their controls, the weights float32 [n, T] (or None: the batch's
#: times the multiplier), multiplier, forward, reverse float32 [n] and converged bool [n].
RowSolver = Callable[[RowBatch, "SolveControls"], tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]]


def solve_rows(batch: RowBatch, controls: SolveControls, paper: RowSolver, roots: RowSolver) -> Solution:
    """Solve the rows of PAPER by `paper`, those of NONE not at all and the others by `roots`, each as plain sums."""
    B, device = batch.size, batch.device
    weights = batch.weights.to(device).clone()
    multiplier = torch.ones(B, device=device)
    forward, reverse = torch.zeros(B, device=device), torch.zeros(B, device=device)
    converged = torch.ones(B, dtype=torch.bool, device=device)
    of_paper = controls.match == Match.PAPER
    for solver, chosen in ((paper, of_paper), (roots, (controls.match != Match.NONE) & ~of_paper)):
        rows = chosen.nonzero()[:, 0]
        if not rows.numel():
            continue
        at = rows.to(device)
        own = SolveControls(controls.match[rows], controls.max_weight[rows], controls.budget[rows])
        found, multiplier[at], forward[at], reverse[at], converged[at] = solver(batch.linear(rows), own)
        weights[at] = weights[at] * multiplier[at, None] if found is None else found
    return Solution(weights, multiplier, forward, reverse, converged)
