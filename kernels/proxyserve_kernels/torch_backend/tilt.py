"""Statistics of the tilted law P_a and of the pairs; see `proxyserve_kernels.tilt` for the formulas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from proxyserve_kernels.rows import ABSENT, CLIP, RowBatch
from proxyserve_kernels.tilt import Moments, PairDivergences, Tilt
from proxyserve_kernels.torch_backend.blocks import across, in_blocks, log_partition
from proxyserve_kernels.torch_backend.scores import add_terms, pairs, take

#: `moments` of more terms than this would need more registers than a Triton program has.
MOST_TERMS = 4


def exact_sum(values: Tensor) -> Tensor:
    """Row sums in float64 of float32 [n, V]: the KL divergences are small differences of large sums."""
    return across(in_blocks(values).sum(dim=-1).double())


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """P and the centred delta of n rows: `log_p` float32 [n, V] and `delta` float32 [n, V] = d - E_P[d]; `mean` float64
    [n] = E_P[d]; `partition` float64 [n] is what rounding leaves of A(0) = 0. Centring keeps the moments of a delta
    with a large constant in it exact."""

    log_p: Tensor
    delta: Tensor
    mean: Tensor
    partition: Tensor

    @classmethod
    def of(cls, batch: RowBatch) -> Curve:
        base = take(batch, batch.base, batch.widths)
        return cls.from_delta(base, total_delta(batch, base))

    @classmethod
    def from_delta(cls, base: Tensor, delta: Tensor) -> Curve:
        log_p = base - log_partition(base)[:, None]
        p = log_p.exp()
        mean = exact_sum(p * delta) / exact_sum(p)
        centred = delta - mean.float()[:, None]
        unshifted = cls(log_p, centred, mean, torch.zeros_like(mean))
        return cls(log_p, centred, mean, unshifted.at(torch.zeros_like(mean))[0])

    def at(self, multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, A', A'' and A''' of the centred delta at one `multiplier` [n] per row, float64 [n] each."""
        exponent = self.log_p + multiplier.float()[:, None] * self.delta
        peak = exponent.amax(dim=1)
        weight = (exponent - peak[:, None]).exp_()
        mass = exact_sum(weight)
        first = weight * self.delta
        second = first * self.delta
        m1, m2 = exact_sum(first) / mass, exact_sum(second) / mass
        m3 = exact_sum(second.mul_(self.delta)) / mass
        variance = (m2 - m1 * m1).clamp(min=0.0)
        return peak.double() + mass.log() - self.partition, m1, variance, m3 - 3 * m1 * m2 + 2 * m1**3


def total_delta(batch: RowBatch, base: Tensor) -> Tensor:
    """Sum of weight * (positive - negative), float32 [B, V]; 0 where the base is -inf, for there P has no mass."""
    delta = torch.zeros_like(base)
    add_terms(batch, delta)
    return delta.masked_fill_(torch.isneginf(base), 0.0)


def tilt(batch: RowBatch, multipliers: Tensor) -> Tilt:
    """See `Backend.tilt`."""
    curve = Curve.of(batch.linear())
    columns = []
    for multiplier in multipliers.to(batch.device).unbind(dim=1):
        log_partition_, mean, variance, third = curve.at(multiplier)
        # A and A' of the delta itself, not of the centred one.
        columns.append((log_partition_ + multiplier * curve.mean, mean + curve.mean, variance, third))
    stacked = [torch.stack(values, dim=1).float() for values in zip(*columns, strict=True)]
    return Tilt(*stacked)


def pair_divergences(batch: RowBatch) -> PairDivergences:
    """See `Backend.pair_divergences`."""
    forward = torch.zeros(batch.size, batch.terms, dtype=torch.float32, device=batch.device)
    reverse = torch.zeros_like(forward)
    for term in range(batch.terms):
        for rows, _, negative in pairs(batch, term, idle=True):
            if negative == ABSENT:
                continue
            above = take(batch, batch.positive[rows, term], batch.widths[rows])
            below = take(batch, batch.negative[rows, term], batch.widths[rows])
            above -= log_partition(above)[:, None]
            below -= log_partition(below)[:, None]
            clip = torch.full_like(above[:, :1], CLIP)
            if batch.rules is not None:
                clip = batch.rules.clip[rows].to(above.device)[:, None]
            # A token that one of the two rules out counts as far, not as infinitely far.
            delta = torch.where(torch.isneginf(below), clip, above - below)
            delta = torch.where(torch.isneginf(above), -clip, delta)
            at = rows.to(batch.device)
            forward[at, term] = _expectation(above.exp_(), delta)
            reverse[at, term] = -_expectation(below.exp_(), delta)
    return PairDivergences(forward, reverse)


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """Sum of p * value over tokens, float32 [n]; a token without mass adds nothing, not even a NaN."""
    return exact_sum(torch.where(p == 0, 0.0, p * values)).float()


def moments(batch: RowBatch) -> Moments:
    """See `Backend.moments`."""
    B, T = batch.size, batch.terms
    if T > MOST_TERMS:
        raise ValueError(f"moments are for at most {MOST_TERMS} terms, not {T}")
    batch = batch.linear()
    base = take(batch, batch.base, batch.widths)
    weights = batch.weights.to(batch.device)
    log_p = base - log_partition(base)[:, None]
    p = log_p.exp()
    each, means = [], []
    for term in range(T):
        one = torch.zeros(B, T)
        one[:, term] = (batch.positive[:, term, 0] != ABSENT).float()
        delta = total_delta(batch.with_weights(one), base)
        mean = exact_sum(p * delta) / exact_sum(p)
        each.append(delta - mean.float()[:, None])
        means.append(mean)
    exponent = log_p.clone()
    for term, delta in enumerate(each):
        exponent += weights[:, term, None] * delta
    peak = exponent.amax(dim=1)
    weight = (exponent - peak[:, None]).exp_()
    mass = exact_sum(weight)
    log_mass = peak.double() + mass.log()
    gradient = torch.zeros(B, T, dtype=torch.float64, device=batch.device)
    covariance = torch.zeros(B, T, T, dtype=torch.float64, device=batch.device)
    for i in range(T):
        gradient[:, i] = exact_sum(weight * each[i]) / mass
    for i in range(T):
        for j in range(i + 1):
            moment = exact_sum(weight * each[i] * each[j]) / mass
            covariance[:, i, j] = covariance[:, j, i] = moment - gradient[:, i] * gradient[:, j]
    for term, mean in enumerate(means):
        gradient[:, term] += mean
        log_mass += weights[:, term] * mean
    return Moments(log_mass.float(), gradient.float(), covariance.float())
