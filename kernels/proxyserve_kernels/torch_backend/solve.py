"""Solve multipliers from divergences: a start from cumulants or a grid, then safeguarded steps.

forward and reverse grow like a^2 near 0, so their square roots are almost straight lines in a: Halley's method on the
square root, kept inside a bracket, needs three or four evaluations. BOTH minimises F = (forward - c1)^2 + (reverse -
c2)^2, which may have two minima: a grid over the whole range finds the cell of the least one, Newton's method on F'
the place in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proxyserve_kernels.rows import ABSENT, RowBatch
from proxyserve_kernels.tilt import PAPER_GRID, Match, Solution, SolveControls, solve_rows
from proxyserve_kernels.torch_backend.scores import take
from proxyserve_kernels.torch_backend.tilt import Curve, pair_divergences, total_delta

#: Points of the grid on which BOTH looks for the cell of the least minimum.
GRID = 16
#: Steps after the start; three or four are usual.
STEPS = 10
#: A row is done when its divergence is this close to the target, relative to it, or its multiplier moves less.
TOLERANCE = 1e-5
#: ... or this close in nats: sums of float32 know no better.
NOISE = 1e-7


def solve(batch: RowBatch, controls: SolveControls) -> Solution:
    """See `Backend.solve`."""
    return solve_rows(batch, controls, _paper, _roots)


def _targets(batch: RowBatch) -> tuple[Tensor, Tensor]:
    """Means over a row's terms of KL(positive || negative) and KL(negative || positive), float64 [B]."""
    pair = pair_divergences(batch)
    share = batch.weights.to(batch.device).double().abs()
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return (share * pair.forward).sum(dim=1), (share * pair.reverse).sum(dim=1)


def _roots(batch: RowBatch, controls: SolveControls) -> tuple[None, Tensor, Tensor, Tensor, Tensor]:
    """A `RowSolver` for all that is not PAPER."""
    match = controls.match.to(batch.device)
    limit = controls.max_weight.to(batch.device).double()
    budget = controls.budget.to(batch.device).double()
    curve = Curve.of(batch)
    forward_target, reverse_target = _targets(batch)
    forward_target = torch.where(match == Match.BUDGET, budget, forward_target)
    both, backward = match == Match.BOTH, match == Match.REVERSE
    target = torch.where(backward, reverse_target, forward_target)

    low, high = torch.zeros_like(limit), limit.clone()
    _, _, variance, third = curve.at(low)
    a = start(target, variance, third, backward).clamp(max=limit)
    if bool(both.any()):
        cell_low, best, cell_high = _cell(curve, limit, forward_target, reverse_target)
        low, high = torch.where(both, cell_low, low), torch.where(both, cell_high, high)
        a = torch.where(both, best, a)
    done = torch.zeros_like(both)
    clamped = torch.zeros_like(both)
    forward, reverse = torch.zeros_like(limit), torch.zeros_like(limit)
    for _ in range(STEPS):
        log_mass, mean, variance, third = curve.at(a)
        # The delta is centred, A'(0) = 0.
        value_f, value_r = a * mean - log_mass, log_mass
        slope_f, slope_r = a * variance, mean
        bend_f, bend_r = variance + a * third, variance
        value = torch.where(backward, value_r, value_f)
        slope, bend = torch.where(backward, slope_r, slope_f), torch.where(backward, bend_r, bend_f)
        step = halley(value, slope, bend, target)
        too_low = value < target
        near = (value - target).abs() <= TOLERANCE * target + NOISE
        if bool(both.any()):
            gap_f, gap_r = value_f - forward_target, value_r - reverse_target
            descent = gap_f * slope_f + gap_r * slope_r
            curvature = slope_f**2 + slope_r**2 + gap_f * bend_f + gap_r * bend_r
            newton = torch.where(curvature > 0, -descent / curvature, torch.inf)
            step = torch.where(both, newton, step)
            too_low = torch.where(both, descent < 0, too_low)
            near_f = gap_f.abs() <= TOLERANCE * forward_target + NOISE
            near_r = gap_r.abs() <= TOLERANCE * reverse_target + NOISE
            near = torch.where(both, near_f & near_r, near)
        new_low, new_high = torch.where(too_low, a, low), torch.where(too_low, high, a)
        reached = too_low & (a >= limit) & ~near
        new = a + step
        inside = (new > new_low) & (new < new_high)
        # A step beyond the largest multiplier is tried there, once; any other that leaves the bracket is halved.
        beyond = too_low & ~inside & (new >= new_high) & (new_high >= limit)
        new = torch.where(inside, new, torch.where(beyond, limit, 0.5 * (new_low + new_high)))
        small = (new - a).abs() <= TOLERANCE * a
        stop = near | reached | (small & inside) | ((new_high - new_low) <= TOLERANCE * new_high)
        new = torch.where(near | reached, a, new)
        moved = new - a
        # The divergences at the new multiplier, to second order.
        forward = torch.where(done, forward, value_f + moved * (slope_f + 0.5 * moved * bend_f))
        reverse = torch.where(done, reverse, value_r + moved * (slope_r + 0.5 * moved * bend_r))
        low, high = torch.where(done, low, new_low), torch.where(done, high, new_high)
        a = torch.where(done, a, new)
        clamped |= reached & ~done
        done |= stop
        if bool(done.all()):
            break
    return None, a.float(), forward.float(), reverse.float(), done & ~clamped


def start(target: Tensor, variance: Tensor, third: Tensor, backward: Tensor) -> Tensor:
    """First guess from the series forward = k2 a^2 / 2 + k3 a^3 / 3, reverse = k2 a^2 / 2 + k3 a^3 / 6."""
    variance = variance.clamp(min=1e-30)
    a = (2 * target / variance).sqrt()
    order = torch.where(backward, 1 / 3, 2 / 3)
    # Nowhere to go and nothing to go there with: any multiplier is right.
    a = torch.where((variance < 1e-12) & (target <= NOISE), 1.0, a)
    return a / (1 + order * third * a / variance).clamp(min=0.25).sqrt()


def halley(value: Tensor, slope: Tensor, bend: Tensor, target: Tensor) -> Tensor:
    """Halley's step for sqrt(value(a)) = sqrt(target), given value' and value''."""
    root = value.clamp(min=1e-30).sqrt()
    error = root - target.clamp(min=0.0).sqrt()
    first = slope / (2 * root)
    second = (0.5 * bend - first**2) / root
    return -2 * error * first / (2 * first**2 - error * second).clamp(min=1e-30)


def _cell(
    curve: Curve, limit: Tensor, forward_target: Tensor, reverse_target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of GRID multipliers evenly spaced up to the limit, with its neighbours, float64 [n] each."""
    points = [limit * (g + 1) / GRID for g in range(GRID)]
    misfits = []
    for a in points:
        log_mass, mean, _, _ = curve.at(a)
        misfits.append((a * mean - log_mass - forward_target) ** 2 + (log_mass - reverse_target) ** 2)
    best = torch.stack(misfits, dim=1).argmin(dim=1).double()
    width = limit / GRID
    return width * best, width * (best + 1), torch.minimum(width * (best + 2), limit)


def _paper(batch: RowBatch, _controls: SolveControls) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights, multiplier, forward, reverse, converged by the published grid, one term at a time."""
    base = take(batch, batch.base, batch.widths)
    pair = pair_divergences(batch)
    B, T = batch.size, batch.terms
    least = torch.full((B,), torch.inf, dtype=torch.float64, device=batch.device)
    weights = torch.zeros(B, T, device=batch.device)
    found, forward, reverse = (torch.zeros_like(least) for _ in range(3))
    for term in range(T):
        one = torch.zeros(B, T)
        one[:, term] = (batch.positive[:, term, 0] != ABSENT).float()
        curve = Curve.from_delta(base, total_delta(batch.with_weights(one), base))
        present = one[:, term].to(batch.device) > 0
        for point in PAPER_GRID:
            a = torch.full_like(least, point)
            log_mass, mean, _, _ = curve.at(a)
            value_f, value_r = a * mean - log_mass, log_mass
            misfit = (value_f - pair.forward[:, term]) ** 2 + (value_r - pair.reverse[:, term]) ** 2
            better = present & (misfit < least)
            least = torch.where(better, misfit, least)
            found = torch.where(better, a, found)
            forward, reverse = torch.where(better, value_f, forward), torch.where(better, value_r, reverse)
            weights[better] = 0.0
            weights[better, term] = point
    return weights, found.float(), forward.float(), reverse.float(), torch.isfinite(least)
