"""Solve multipliers from divergences, one row after another: `line` evaluates, `roots` says where."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from proxyserve_kernels.rows import ABSENT, RowBatch
from proxyserve_kernels.tilt import PAPER_GRID, Match, Solution, SolveControls, solve_rows
from proxyserve_kernels.torch_backend.line import Line
from proxyserve_kernels.torch_backend.roots import Found, find, least

#: Nats: a divergence below this is rounding of float64, and a multiplier for it comes from the series at 0.
NOISE = 1e-13
#: Square nats: a delta of less variance is a constant.
NOTHING = 1e-24


def solve(batch: RowBatch, controls: SolveControls) -> Solution:
    """See `Backend.solve`."""
    return solve_rows(batch, controls, _paper, _roots)


def _roots(batch: RowBatch, controls: SolveControls) -> tuple[None, Tensor, Tensor, Tensor, Tensor]:
    """A `RowSolver` for all that is not PAPER."""
    line = Line(batch)
    asked = zip(
        batch.weights.tolist(),
        controls.match.tolist(),
        controls.max_weight.tolist(),
        controls.budget.tolist(),
        strict=True,
    )
    found = [_row(line, row, *wish) for row, wish in enumerate(asked)]
    a, forward, reverse, reached = zip(*found, strict=True)
    floats = torch.tensor((a, forward, reverse), dtype=torch.float32, device=batch.device)
    return None, floats[0], floats[1], floats[2], torch.tensor(reached, device=batch.device)


def _row(line: Line, row: int, weights: list[float], match: int, limit: float, budget: float) -> Found:
    forward, reverse = line.load(row, weights)
    if match == Match.BUDGET:
        forward = budget
    goal = reverse if match == Match.REVERSE else forward
    if math.isnan(line.zero.variance + goal + reverse):
        return Found(min(1.0, limit), math.nan, math.nan, False)
    if line.zero.variance <= NOTHING:
        # A direction of nothing: any multiplier gets as far as nowhere, none further.
        return Found(min(1.0, limit), 0.0, 0.0, True) if goal <= NOISE else Found(limit, 0.0, 0.0, False)
    start = line.start()
    if goal <= NOISE:
        a = math.sqrt(max(goal, 0.0)) / start.forward.slope
        return Found(min(a, limit), goal, goal, a < limit)
    # Where the base is like the untuned model, the weight that gives the tuned one.
    guess = 1 / sum(map(abs, weights))
    if match == Match.BOTH:
        return least(line.at, start, forward, reverse, limit, guess)
    return find(line.at, start, "reverse" if match == Match.REVERSE else "forward", goal, limit, guess)


def _paper(batch: RowBatch, _controls: SolveControls) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights, multiplier, forward, reverse, converged by the published grid, one term at a time."""
    line, T = Line(batch), batch.terms
    weights = torch.zeros(batch.size, T)
    best = []
    for row, present in enumerate((batch.positive[..., 0] != ABSENT).tolist()):
        terms = [term for term in range(T) if present[term]]
        goals, curves = [], []
        for term in terms:
            goals.append(line.load(row, [float(other == term) for other in range(T)]))
            curves.append(line.grid(PAPER_GRID))
        # The objective sums over the terms' divergences: all but a constant of it is the distance to their mean.
        forward_goal = sum(forward for forward, _ in goals) / max(1, len(goals))
        reverse_goal = sum(reverse for _, reverse in goals) / max(1, len(goals))
        lowest, won = math.inf, (0.0, 0.0, 0.0)
        for term, curve in zip(terms, curves, strict=True):
            for point, (forward, reverse) in zip(PAPER_GRID, curve, strict=True):
                misfit = (forward - forward_goal) ** 2 + (reverse - reverse_goal) ** 2
                if misfit < lowest:
                    lowest, won = misfit, (point, forward, reverse)
                    weights[row] = 0.0
                    weights[row, term] = point
        best.append((*won, math.isfinite(lowest)))
    found, forwards, reverses, fine = zip(*best, strict=True)
    floats = torch.tensor((found, forwards, reverses), dtype=torch.float32, device=batch.device)
    fine_rows = torch.tensor(fine, device=batch.device)
    return weights.to(batch.device), floats[0], floats[1], floats[2], fine_rows
