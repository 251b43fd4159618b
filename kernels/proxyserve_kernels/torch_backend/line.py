"""One row's tilted law P_a, evaluated at one multiplier after another; formulas in `proxyserve_kernels.tilt`.

In float64, because a divergence is a small difference of large sums; in bits, because torch's exp2 of float64 is three
times as fast as its exp. One row at a time, in buffers that are used again: so its numbers stay in the cache, and what
it gives cannot depend on its neighbours. All moments come from one product with the matrix [1, d, d^2, d^3].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proxyserve_kernels.rows import ABSENT, CLIP, RowBatch
from proxyserve_kernels.torch_backend.roots import Point

LN2 = math.log(2.0)
#: Sums of exponentials in between have lost nothing and overflow not even times d^3; others are formed again, shifted.
LEAST, MOST = 1e-200, 1e200


class Sums(NamedTuple):
    """At one multiplier, of the delta as `Line` holds it but in nats: log of the sum of exp(base + a d), mean, variance
    and third central moment."""

    log_sum: float
    mean: float
    variance: float
    third: float


class Line:
    """Room for one row of `batch` at a time: `load` a row, then ask for what P_a is like there.

    Of the row in it: `base` float64 [width] in bits, and `powers` float64 [4, width], the powers 0 to 3 of d in bits;
    d is the weighted delta less a constant. `zero` holds the sums at a = 0.
    """

    def __init__(self, batch: RowBatch) -> None:
        self.batch = batch
        self.bases, self.widths = batch.base.tolist(), batch.widths.tolist()
        self.pairs = list(zip(batch.positive.tolist(), batch.negative.tolist(), strict=True))
        self.room = torch.empty(7 * max(self.widths), dtype=torch.float64, device=batch.device)

    def load(self, row: int, weights: Sequence[float]) -> tuple[float, float]:
        """Take in row number `row` with one weight per term; the means over its terms, by |weight|, of
        KL(positive || negative) and KL(negative || positive), in nats."""
        width = self.widths[row]
        # Cut by the row's own width: everything lies, and so is added up, as it would for the row alone.
        room = self.room[: 7 * width].view(7, width)
        self.powers, self.base, self.scratch, self.other = room[:4], room[4], room[5], room[6]
        self.powers[0].fill_(1.0)
        clip = (CLIP if self.batch.rules is None else float(self.batch.rules.clip[row])) / LN2
        forward = reverse = total = 0.0
        for weight, positive, negative in zip(weights, *self.pairs[row], strict=True):
            if weight == 0 or positive[0] == ABSENT:
                continue
            delta = self.powers[2] if total else self.powers[1]
            ahead, behind = self._pair(positive, negative, clip, delta)
            if total:
                self.powers[1].add_(delta, alpha=weight)
            elif weight != 1:
                delta.mul_(weight)
            total += abs(weight)
            forward += abs(weight) * ahead
            reverse += abs(weight) * behind
        if not total:
            self.powers[1].zero_()
        torch.mul(self.powers[1], self.powers[1], out=self.powers[2])
        torch.mul(self.powers[2], self.powers[1], out=self.powers[3])
        self._take(self.bases[row], self.base)
        self.zero = self.sums(0.0)
        # Rounding alone makes them negative; a NaN stays one.
        return max(forward, 0.0) / (total or 1.0), max(reverse, 0.0) / (total or 1.0)

    def _take(self, ref: Sequence[int], out: Tensor) -> None:
        """The logits that (source, row) `ref` names, in bits."""
        source, row = ref
        out.copy_(self.batch.sources[source][row, : out.shape[0]]).mul_(1 / LN2)

    def _pair(
        self, positive: Sequence[int], negative: Sequence[int], clip: float, delta: Tensor
    ) -> tuple[float, float]:
        """Of the two rows that a term names: positive - negative, in bits and less its mean, into `delta`; and their
        divergences in nats. A token that one of them rules out counts `clip`, in bits."""
        above, below, weight = self.scratch, self.other, self.powers[3]
        self._take(positive, above)
        alone = negative[0] == ABSENT
        if alone:
            delta.copy_(above)
        else:
            self._take(negative, below)
            torch.sub(above, below, out=delta)
        shift = float(delta.sum()) / delta.shape[0]
        holes = None
        if not math.isfinite(shift):
            lost = torch.isneginf(above)
            gained = torch.zeros_like(lost) if alone else torch.isneginf(below)
            holes = lost | gained
            # Times 0: what the other row holds does not matter, unless it is a NaN.
            delta.copy_(torch.where(lost, -clip if alone else 0.0 * below - clip, delta))
            delta.copy_(torch.where(gained, 0.0 * above + clip, delta).masked_fill_(lost & gained, 0.0))
            shift = float(delta.sum()) / delta.shape[0]
        delta.sub_(shift)
        if alone:
            return 0.0, 0.0
        gain, log_above, shared_above = _mean(above, delta, holes, weight)
        loss, log_below, shared_below = _mean(below, delta, holes, weight)
        normalise = log_above - log_below
        forward = gain + (shift - normalise * shared_above)
        reverse = (normalise * shared_below - shift) - loss
        return LN2 * forward, LN2 * reverse

    def sums(self, multiplier: float) -> Sums:
        """One pass over the row."""
        if multiplier == 0:
            self.scratch.copy_(self.base)
        else:
            torch.add(self.base, self.powers[1], alpha=multiplier, out=self.scratch)
        shift, sums = 0.0, torch.mv(self.powers, self.scratch.exp2_()).tolist()
        if not LEAST < sums[0] < MOST:
            torch.add(self.base, self.powers[1], alpha=multiplier, out=self.scratch)
            shift = float(self.scratch.amax())
            sums = torch.mv(self.powers, self.scratch.sub_(shift).exp2_()).tolist()
        mass, one, two, three = sums
        one, two, three = LN2 * one / mass, LN2**2 * two / mass, LN2**3 * three / mass
        log_sum = LN2 * (math.log2(mass) + shift)
        return Sums(log_sum, one, max(two - one * one, 0.0), three - 3 * one * two + 2 * one**3)

    def start(self) -> Point:
        """What the row is like at a = 0."""
        return Point.at_zero(self.zero.variance, self.zero.third)

    def at(self, multiplier: float) -> Point:
        """What it is like at another multiplier: one pass."""
        log_sum, mean, variance, third = self.sums(multiplier)
        log_partition = log_sum - self.zero.log_sum - multiplier * self.zero.mean
        return Point.of(multiplier, log_partition, mean - self.zero.mean, variance, third)

    def grid(self, points: Sequence[float]) -> list[tuple[float, float]]:
        """forward and reverse at evenly spaced multipliers from 0 on."""
        step = torch.mul(self.powers[1], points[1], out=self.other).exp2_()
        weight = torch.exp2(self.base, out=self.scratch)
        divergences = []
        for number, point in enumerate(points):
            if number:
                weight.mul_(step)
            mass, one = torch.mv(self.powers[:2], weight).tolist()
            if not LEAST < mass < MOST:
                return [self._divergences(point, *self.sums(point)[:2]) for point in points]
            divergences.append(self._divergences(point, LN2 * math.log2(mass), LN2 * one / mass))
        return divergences

    def _divergences(self, multiplier: float, log_sum: float, mean: float) -> tuple[float, float]:
        log_partition = log_sum - self.zero.log_sum
        return multiplier * mean - log_partition, log_partition - multiplier * self.zero.mean


def _mean(scores: Tensor, delta: Tensor, holes: Tensor | None, room: Tensor) -> tuple[float, float, float]:
    """Under softmax(scores), all float64 [width] and in bits: E[delta], log of the sum of exponentials, and how much of
    the law lies outside of `holes`. `room` is written to."""
    shift, mass = 0.0, float(torch.exp2(scores, out=room).sum())
    if not LEAST < mass < MOST:
        shift = float(scores.amax())
        mass = float(torch.sub(scores, shift, out=room).exp2_().sum())
    mean = float(torch.dot(room, delta)) / mass
    outside = 1.0 if holes is None else float(room.masked_fill_(holes, 0.0).sum()) / mass
    return mean, math.log2(mass) + shift, outside
