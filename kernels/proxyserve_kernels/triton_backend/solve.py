"""Dynamic weights on the device: passes over the logits and solver steps in a fixed sequence, nothing read back."""

from __future__ import annotations

import torch
from torch import Tensor

from proxyserve_kernels.rows import ABSENT, RowBatch
from proxyserve_kernels.tilt import (
    PAPER_GRID,
    Match,
    Moments,
    PairDivergences,
    Solution,
    SolveControls,
    Tilt,
    solve_rows,
)
from proxyserve_kernels.torch_backend.tilt import MOST_TERMS
from proxyserve_kernels.triton_backend.device import tilt as kernels
from proxyserve_kernels.triton_backend.launch import padded
from proxyserve_kernels.triton_backend.table import RowTable, build_table
from proxyserve_kernels.triton_backend.tuning import ROW_OPTIONS, tile_for

#: Points of the grid on which BOTH looks for the cell of the least minimum.
GRID = 16
#: Steps after the start; three or four are usual.
STEPS = 10


class Curves:
    """A batch's tilted laws on the device. `partition` and `centre` float64 [bucket]: log-partition of the base, and
    E_P[d], about which d is centred."""

    def __init__(self, table: RowTable) -> None:
        self.table = table
        device = table.ints.device
        self.planes = torch.empty(5, table.bucket, table.blocks, dtype=torch.float32, device=device)
        self.running = torch.zeros(table.bucket, dtype=torch.float64, device=device)
        self.centre = torch.zeros(table.bucket, dtype=torch.float64, device=device)
        at_zero = self.moments(torch.zeros(table.bucket, 1, dtype=torch.float64, device=device))
        self.partition, self.centre = at_zero[0].clone(), at_zero[1].clone()

    def stats(
        self, multipliers: Tensor, done: Tensor, planes: Tensor, *, points: int = 1, moments: int = 3
    ) -> None:
        """One pass at `points` columns of `multipliers` float64 [bucket, columns]."""
        table = self.table
        tile = tile_for(table.bucket, table.blocks)
        kernels.tilt_stats[(table.bucket, -(-table.blocks // tile.blocks))](
            table.ints, table.floats, multipliers, self.centre, done, planes,
            table.ints.stride(0), table.floats.stride(0), table.blocks, table.bucket * table.blocks,
            multipliers.stride(0), TILE=tile.blocks, POINTS=points, MOMENTS=moments,
            KIND=table.variant.kind, TERMS=table.variant.terms, **tile.options,
        )  # fmt: skip

    def moments(self, multiplier: Tensor) -> Tensor:
        """Log of the sum of exp(base + a d), mean, variance and third moment of the centred d: float64 [4, bucket]."""
        table = self.table
        self.stats(multiplier, self.running, self.planes)
        out = torch.empty(4, table.bucket, dtype=torch.float64, device=table.ints.device)
        kernels.gather_moments[(table.bucket,)](
            self.planes, out, table.blocks, table.bucket * table.blocks, table.bucket,
            BLOCKS=padded(table.blocks), **ROW_OPTIONS,
        )  # fmt: skip
        return out

    def grid(self, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """forward and reverse at `multipliers` float64 [bucket, points], in one pass; float64 [bucket, points] each."""
        table, points = self.table, multipliers.shape[1]
        planes = torch.empty(
            points * 3, table.bucket, table.blocks, dtype=torch.float32, device=table.ints.device
        )
        self.stats(multipliers, self.running, planes, points=points, moments=1)
        out = torch.empty(2, table.bucket, points, dtype=torch.float64, device=table.ints.device)
        kernels.gather_grid[(table.bucket, points)](
            planes, out, table.blocks, table.bucket * table.blocks, table.bucket, points,
            BLOCKS=padded(table.blocks), **ROW_OPTIONS,
        )  # fmt: skip
        log_mass = out[0] - self.partition[:, None]
        return multipliers * out[1] - log_mass, log_mass


def tilt(batch: RowBatch, multipliers: Tensor) -> Tilt:
    """See `Backend.tilt`."""
    table = build_table(batch.linear())
    curves = Curves(table)
    columns = []
    for a in multipliers.to(batch.device).double().unbind(dim=1):
        at = torch.zeros(table.bucket, 1, dtype=torch.float64, device=batch.device)
        at[: table.rows, 0] = a
        log_sum, mean, variance, third = curves.moments(at)[:, : table.rows]
        centre = curves.centre[: table.rows]
        columns.append(
            (log_sum - curves.partition[: table.rows] + a * centre, mean + centre, variance, third)
        )
    return Tilt(*(torch.stack(values, dim=1).float() for values in zip(*columns, strict=True)))


def pair_divergences(batch: RowBatch) -> PairDivergences:
    """See `Backend.pair_divergences`."""
    forward, reverse = _pairs(build_table(batch.linear()))
    return PairDivergences(forward[: batch.size, : batch.terms], reverse[: batch.size, : batch.terms])


def _pairs(table: RowTable) -> tuple[Tensor, Tensor]:
    T, device = table.variant.terms, table.ints.device
    planes = torch.empty(8 * T, table.bucket, table.blocks, dtype=torch.float32, device=device)
    tile = tile_for(table.bucket, table.blocks)
    strides = (table.ints.stride(0), table.floats.stride(0), table.blocks, table.bucket * table.blocks)
    kernels.pair_stats[(table.bucket, -(-table.blocks // tile.blocks))](
        table.ints, table.floats, planes, *strides, TILE=tile.blocks,
        KIND=table.variant.kind, TERMS=T, **tile.options,
    )  # fmt: skip
    forward = torch.empty(table.bucket, T, dtype=torch.float32, device=device)
    reverse = torch.empty_like(forward)
    kernels.gather_pairs[(table.bucket, T)](
        table.ints, table.floats, planes, forward, reverse, *strides, T,
        BLOCKS=padded(table.blocks), **ROW_OPTIONS,
    )  # fmt: skip
    return forward, reverse


def moments(batch: RowBatch) -> Moments:
    """See `Backend.moments`."""
    if batch.terms > MOST_TERMS:
        raise ValueError(f"moments are for at most {MOST_TERMS} terms, not {batch.terms}")
    table = build_table(batch.linear())
    bucket, T, device = table.bucket, table.variant.terms, batch.device
    weights = table.weight_columns().clone()
    centres = torch.zeros(bucket, T, dtype=torch.float64, device=device)
    table.weight_columns().zero_()
    at_zero = _moment_sums(table, centres)
    centres = at_zero[:, 2 : 2 + T].contiguous()
    table.weight_columns().copy_(weights)
    sums = _moment_sums(table, centres)
    gradient = sums[:, 2 : 2 + T]
    covariance = torch.zeros(bucket, T, T, dtype=torch.float64, device=device)
    for i in range(T):
        for j in range(i + 1):
            moment = sums[:, 2 + T + i * (i + 1) // 2 + j]
            covariance[:, i, j] = covariance[:, j, i] = moment - gradient[:, i] * gradient[:, j]
    log_partition = sums[:, 1] - at_zero[:, 1] + (weights * centres).sum(dim=1)
    B, own = table.rows, batch.terms
    return Moments(
        log_partition[:B].float(), (gradient + centres)[:B, :own].float(), covariance[:B, :own, :own].float()
    )


def _moment_sums(table: RowTable, centres: Tensor) -> Tensor:
    T, device = table.variant.terms, table.ints.device
    count = 2 + T + T * (T + 1) // 2
    planes = torch.empty(count, table.bucket, table.blocks, dtype=torch.float32, device=device)
    tile = tile_for(table.bucket, table.blocks)
    plane = table.bucket * table.blocks
    kernels.moment_stats[(table.bucket, -(-table.blocks // tile.blocks))](
        table.ints, table.floats, centres, planes, table.ints.stride(0), table.floats.stride(0), table.blocks, plane,
        TILE=tile.blocks, KIND=table.variant.kind, TERMS=T, **tile.options,
    )  # fmt: skip
    out = torch.zeros(table.bucket, count, dtype=torch.float64, device=device)
    kernels.gather_sums[(table.bucket, count - 1)](
        planes, out, table.blocks, plane, count, BLOCKS=padded(table.blocks), **ROW_OPTIONS
    )
    return out


def solve(batch: RowBatch, controls: SolveControls) -> Solution:
    """See `Backend.solve`."""
    return solve_rows(batch, controls, _paper, _roots)


def _roots(batch: RowBatch, controls: SolveControls) -> tuple[None, Tensor, Tensor, Tensor, Tensor]:
    """A `RowSolver` for all that is not PAPER."""
    table = build_table(batch)
    B, bucket, device = table.rows, table.bucket, batch.device
    curves = Curves(table)

    def column(values: Tensor, unused: float) -> Tensor:
        whole = torch.full((bucket,), unused, dtype=torch.float64)
        whole[:B] = values.double()
        return whole.to(device, non_blocking=True)

    match = torch.zeros(bucket, dtype=torch.int64)
    match[:B] = controls.match
    any_both = bool((match == Match.BOTH).any())
    match = match.to(device, non_blocking=True)
    limit, budget = column(controls.max_weight, 1.0), column(controls.budget, 0.0)
    pair_forward, pair_reverse = _pairs(table)
    share = table.weight_columns().double().abs()
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1e-30)
    forward_target = torch.where(match == Match.BUDGET, budget, (share * pair_forward).sum(dim=1))
    reverse_target = (share * pair_reverse).sum(dim=1)
    target = torch.where(match == Match.REVERSE, reverse_target, forward_target)

    # An even pitch: every row of it is aligned to 16 bytes, in every bucket alike.
    state = torch.zeros(kernels.STATE, max(2, bucket), dtype=torch.float64, device=device)[:, :bucket]
    state[kernels.HIGH.value] = limit
    _, _, variance, third = curves.moments(torch.zeros(bucket, 1, dtype=torch.float64, device=device))
    a = start(target, variance, third, match == Match.REVERSE)
    state[kernels.AT.value] = torch.minimum(a, limit)
    if any_both:
        both = match == Match.BOTH
        points = limit[:, None] * torch.arange(1, GRID + 1, device=device) / GRID
        value_f, value_r = curves.grid(points)
        misfit = (value_f - forward_target[:, None]) ** 2 + (value_r - reverse_target[:, None]) ** 2
        best = misfit.argmin(dim=1).double()
        width = limit / GRID
        state[kernels.LOW.value] = torch.where(both, width * best, state[kernels.LOW.value])
        state[kernels.AT.value] = torch.where(both, width * (best + 1), state[kernels.AT.value])
        high = torch.minimum(width * (best + 2), limit)
        state[kernels.HIGH.value] = torch.where(both, high, state[kernels.HIGH.value])
    unused = torch.arange(bucket, device=device) >= B
    done = state[kernels.DONE.value]
    done.masked_fill_(unused, 1.0)
    for _ in range(STEPS):
        curves.stats(state[kernels.AT.value][:, None], done, curves.planes)
        kernels.solve_step[(bucket,)](
            curves.planes, curves.partition, state, match, limit, forward_target, reverse_target,
            table.blocks, bucket * table.blocks, state.stride(0), BLOCKS=padded(table.blocks), **ROW_OPTIONS,
        )  # fmt: skip
    found = state[:, :B]
    converged = (found[kernels.DONE.value] != 0) & (found[kernels.CLAMPED.value] == 0)
    return (
        None,
        found[kernels.AT.value].float(),
        found[kernels.FORWARD_AT.value].float(),
        found[kernels.REVERSE_AT.value].float(),
        converged,
    )


def start(target: Tensor, variance: Tensor, third: Tensor, backward: Tensor) -> Tensor:
    """First guess from the series forward = k2 a^2 / 2 + k3 a^3 / 3, reverse = k2 a^2 / 2 + k3 a^3 / 6."""
    variance = variance.clamp(min=1e-30)
    a = (2 * target / variance).sqrt()
    order = torch.where(backward, 1 / 3, 2 / 3)
    # Nowhere to go and nothing to go there with: any multiplier is right.
    a = torch.where((variance < 1e-12) & (target <= kernels.NOISE.value), 1.0, a)
    return a / (1 + order * third * a / variance).clamp(min=0.25).sqrt()


def _paper(batch: RowBatch, _controls: SolveControls) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights, multiplier, forward, reverse, converged by the published grid, one term at a time."""
    table = build_table(batch)
    B, T, device = table.rows, batch.terms, batch.device
    pair_forward, pair_reverse = _pairs(table)
    points = (
        torch.tensor(PAPER_GRID, dtype=torch.float64, device=device).expand(table.bucket, -1).contiguous()
    )
    present = (batch.positive[..., 0] != ABSENT).to(device)
    # The objective sums over the terms' divergences: all but a constant of it is the distance to their mean.
    count = present.sum(dim=1, keepdim=True).clamp(min=1)
    forward_goal = pair_forward[:B, :T].masked_fill(~present, 0.0).sum(dim=1, keepdim=True) / count
    reverse_goal = pair_reverse[:B, :T].masked_fill(~present, 0.0).sum(dim=1, keepdim=True) / count
    misfits, forwards, reverses = [], [], []
    for term in range(T):
        columns = table.weight_columns()
        columns.zero_()
        columns[:B, term] = present[:, term].float()
        value_f, value_r = (values[:B] for values in Curves(table).grid(points))
        misfit = (value_f - forward_goal) ** 2 + (value_r - reverse_goal) ** 2
        misfits.append(misfit.masked_fill(~present[:, term, None] | misfit.isnan(), torch.inf))
        forwards.append(value_f)
        reverses.append(value_r)
    # argmin takes the first of equals: the first term, the lowest multiplier.
    misfit = torch.cat(misfits, dim=1)
    best = misfit.argmin(dim=1, keepdim=True)
    steps = len(PAPER_GRID)
    found = points[:B].gather(1, best % steps)[:, 0].float()
    fine = torch.isfinite(misfit.gather(1, best)[:, 0])
    weights = torch.zeros(B, T, device=device).scatter(1, best // steps, found[:, None])
    forward = torch.cat(forwards, dim=1).gather(1, best)[:, 0].float()
    reverse = torch.cat(reverses, dim=1).gather(1, best)[:, 0].float()
    return weights, found, forward, reverse, fine
