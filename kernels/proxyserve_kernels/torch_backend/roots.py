"""Where to evaluate a divergence next: scalar arithmetic on what the passes over one row have found so far.

The square roots of forward(a) and reverse(a) grow almost like straight lines, then bend: upwards where a token that was
rare takes over, downwards where it has and the divergence runs into its limit. So each root is continued from a point
by the exponential with the same value, slope and bend,

    s(a + h) = s + s' (1 - exp(-l h)) / l        l = -s'' / s'

which is exact to second order and follows both kinds of bend: two or three evaluations find a target to 1e-6.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

#: What comes of a step shorter than this, relative to the multiplier, is exact to about its cube: 1e-7.
SHORT = 5e-3
#: BOTH: the model's slopes are exact to the square of the step only, which counts by the distance of the two roots.
SQUARE = 1e-6
#: Most evaluations, the one at 0 not among them.
STEPS = 12
#: Between roots further apart than this the misfit can have two minima.
WIDE = 1.25
#: Points at which the model of the misfit is looked at between two roots that are further apart.
SCAN = 32


class Bend(NamedTuple):
    """The square root of a divergence at one multiplier: its value and first two derivatives."""

    value: float
    slope: float
    bend: float

    @classmethod
    def of(cls, value: float, slope: float, bend: float) -> Bend:
        """From the divergence itself and its derivatives."""
        root = math.sqrt(max(value, 1e-300))
        first = max(slope / (2 * root), 1e-150)
        return cls(root, first, (0.5 * bend - first * first) / root)

    def step_to(self, root: float) -> float:
        """The h at which the continued root is `root`; infinite where it never is."""
        gap, rate = (root - self.value) / self.slope, -self.bend / self.slope
        if abs(rate * gap) < 1e-8:
            return gap
        left = 1 - rate * gap
        return -math.log(left) / rate if left > 0 else math.copysign(math.inf, gap)

    def after(self, h: float) -> tuple[float, float, float]:
        """The divergence and its first two derivatives at a distance `h`."""
        rate = -self.bend / self.slope
        exponent = min(max(-rate * h, -50.0), 50.0)
        moved = -math.expm1(exponent) / rate if abs(exponent) > 1e-8 else h
        value, slope = self.value + self.slope * moved, self.slope * math.exp(exponent)
        return value * value, 2 * value * slope, 2 * slope * slope - 2 * rate * value * slope


class Point(NamedTuple):
    """One evaluation."""

    a: float
    forward: Bend
    reverse: Bend

    @classmethod
    def of(cls, a: float, log_partition: float, mean: float, variance: float, third: float) -> Point:
        """From A, A', A'', A''' of a delta with A'(0) = 0; formulas in `proxyserve_kernels.tilt`. Where one token has
        all of the law, what is left of its variance is rounding."""
        if variance < 1e-13 * mean * mean:
            variance = third = 0.0
        forward = Bend.of(a * mean - log_partition, a * variance, variance + a * third)
        return cls(a, forward, Bend.of(log_partition, mean, variance))

    @classmethod
    def at_zero(cls, variance: float, third: float) -> Point:
        """From the series forward = A'' a^2 / 2 + A''' a^3 / 3, reverse = A'' a^2 / 2 + A''' a^3 / 6."""
        slope, bend = math.sqrt(0.5 * variance), third / math.sqrt(4.5 * variance)
        return cls(0.0, Bend(0.0, slope, bend), Bend(0.0, slope, 0.5 * bend))


class Found(NamedTuple):
    """A multiplier, both divergences there, and whether the targets were met within the limit."""

    a: float
    forward: float
    reverse: float
    reached: bool


#: Evaluates a row at a multiplier above 0.
Evaluate = Callable[[float], Point]


def _found(point: Point, a: float, reached: bool) -> Found:
    """At `a`, a short step from `point`."""
    return Found(a, point.forward.after(a - point.a)[0], point.reverse.after(a - point.a)[0], reached)


def _trusted(zero: Bend, target: float) -> float | None:
    """The root by the series at 0, None where its second order is no small correction."""
    h = zero.step_to(math.sqrt(target))
    return h if abs(h * zero.bend) <= 0.3 * zero.slope else None


def find(
    at: Evaluate, zero: Point, side: Literal["forward", "reverse"], target: float, limit: float, guess: float
) -> Found:
    """Where one divergence reaches its target: steps to the continued root inside a bracket. `guess` is where to begin
    if the series at 0 does not say."""
    root = math.sqrt(target)
    a = min(_trusted(getattr(zero, side), target) or guess, limit)
    low, high, floor = 0.0, math.inf, None
    for _ in range(STEPS):
        point = at(a)
        own: Bend = getattr(point, side)
        if own.value < root:
            low, floor = a, own.value**2
            if a >= limit:
                return _found(point, limit, False)
        elif own.value >= root:
            high = a
        else:
            break
        h = own.step_to(root)
        if abs(h) <= SHORT * a and a + h <= limit:
            return _found(point, a + h, True)
        if floor is not None and -h > 0.1 * a:
            h = _descent(own, floor).step_to(math.log(max(target - floor, 1e-300)))
        a = min(_inside(a + h, low, high), limit)
    return Found(a, math.nan, math.nan, False)


def _descent(own: Bend, floor: float) -> Bend:
    """The log of what a divergence has above `floor`, where it was seen to be almost flat: before a rare token takes
    over that grows exponentially."""
    value, slope, bend = own.after(0.0)
    excess = max(value - floor, 1e-300)
    first = slope / excess
    return Bend(math.log(excess), first, bend / excess - first * first)


def _inside(a: float, low: float, high: float) -> float:
    """`a` if it lies between what is known to be too low and too high, else a place between them."""
    if low < a < min(high, 4 * low if low else math.inf):
        return a
    if high == math.inf:
        return 4 * low
    return 0.5 * (low + high) if low else 0.25 * high


def least(at: Evaluate, zero: Point, forward: float, reverse: float, limit: float, guess: float) -> Found:
    """Where (forward(a) - forward)^2 + (reverse(a) - reverse)^2 is least.

    That is between the places where either divergence reaches its target, for both grow: Newton's method on what the
    best point continues to. If the two places are far apart there can be two minima between them. Then the misfit is
    looked at all over that range, as modelled between all points known so far, and the ends of the range are evaluated
    too before the best point is believed."""
    starts = (_trusted(zero.forward, forward), _trusted(zero.reverse, reverse))
    a = min(0.5 * (starts[0] + starts[1]) if starts[0] and starts[1] else guess, limit)
    known = [zero]

    def misfit(point: Point) -> float:
        return (point.forward.value**2 - forward) ** 2 + (point.reverse.value**2 - reverse) ** 2

    for _ in range(STEPS):
        point = at(a)
        if not misfit(point) < math.inf:
            break
        insort(known, point, key=lambda point: point.a)
        ends = (_root(known, "forward", forward, limit), _root(known, "reverse", reverse, limit))
        left, right = min(ends), max(ends)
        # A point outside of that range may have less misfit, but says little of what is inside.
        best = min(known[1:], key=lambda point: (max(left - point.a, point.a - right, 0.0), misfit(point)))
        if right > WIDE * left:
            left, right = _worthwhile(best, forward, reverse, left, right)
        new = _nearby(best, forward, reverse, left, right)
        h = (new - best.a) / best.a
        arrived = abs(h) <= SHORT and (right - left) / best.a * h * h <= SQUARE
        if right > WIDE * left:
            scanned = _scan(known, forward, reverse, left, right)
            unseen = [end for end in (left, right) if not _seen(known, end, 0.2 * (right - left))]
            if abs(scanned - new) > 2 * (right - left) / SCAN:
                new, arrived = scanned, False
            elif arrived and unseen:
                new, arrived = unseen[0], False
        if arrived:
            return _found(best, new, new < limit)
        a = new if not _seen(known, new, 1e-9 * new) else 0.5 * (best.a + new)
    return Found(a, math.nan, math.nan, False)


def _seen(known: Sequence[Point], a: float, within: float) -> bool:
    return any(abs(point.a - a) <= within for point in known)


def _root(known: Sequence[Point], side: Literal["forward", "reverse"], target: float, limit: float) -> float:
    """Where a divergence reaches its target, by the known point on either side that says it is nearer; at most the
    limit. If neither point's continuation stays between the two, their middle."""
    root = math.sqrt(target)
    place = bisect_right(known, root, key=lambda point: getattr(point, side).value)
    low, high = known[place - 1].a if place else 0.0, known[place].a if place < len(known) else math.inf
    steps = [(getattr(point, side).step_to(root), point.a) for point in known[max(place - 1, 0) : place + 1]]
    inside = [(abs(step), a + step) for step, a in steps if low <= a + step <= high]
    if inside:
        return min(min(inside)[1], limit)
    return min(4 * low if high == math.inf else 0.5 * (low + high), limit)


def _nearby(point: Point, forward: float, reverse: float, left: float, right: float) -> float:
    """The least misfit between `left` and `right` near `point`, by Newton's method on what the point continues to."""
    a = min(max(point.a, left), right)
    for _ in range(4):
        f, f1, f2 = point.forward.after(a - point.a)
        r, r1, r2 = point.reverse.after(a - point.a)
        slope = (f - forward) * f1 + (r - reverse) * r1
        straight = f1 * f1 + r1 * r1
        bend = straight + (f - forward) * f2 + (r - reverse) * r2
        # Where the misfit bends down, as if both divergences were straight lines.
        before, a = a, min(max(a - slope / (bend if bend > 0.1 * straight else straight), left), right)
        if abs(a - before) <= 1e-7 * a:
            break
    return a


def _worthwhile(
    point: Point, forward: float, reverse: float, left: float, right: float
) -> tuple[float, float]:
    """The part of the range where the misfit can be less than at `point`: there reverse is within the root of that
    misfit from its target. It is convex and 0 at 0: above its tangent to the right, below its chord to the left."""
    value, slope, _ = point.reverse.after(0.0)
    reach = math.hypot(point.forward.value**2 - forward, value - reverse)
    left = max(left, min(point.a * (reverse - reach) / value, point.a))
    return left, max(min(right, point.a + (reverse + reach - value) / slope), left)


def _scan(known: Sequence[Point], forward: float, reverse: float, left: float, right: float) -> float:
    """The least misfit at evenly spaced places from `left` to `right`."""
    places = [left + (right - left) * number / SCAN for number in range(SCAN + 1)]

    def misfit(a: float) -> float:
        f, r = _between(known, a)
        return (f - forward) ** 2 + (r - reverse) ** 2

    return min(places, key=misfit)


def _between(known: Sequence[Point], a: float) -> tuple[float, float]:
    """forward and reverse at `a`: what the known points on either side continue to, blended so that value, slope and
    bend are right at both, and no further than the points themselves, for both divergences grow."""
    place = bisect_right(known, a, key=lambda point: point.a)
    before = known[place - 1]
    values = (before.forward.after(a - before.a)[0], before.reverse.after(a - before.a)[0])
    if place == len(known):
        return values
    after = known[place]
    t = (a - before.a) / (after.a - before.a)
    share = t * t * t * (10 - 15 * t + 6 * t * t)
    others = (after.forward.after(a - after.a)[0], after.reverse.after(a - after.a)[0])
    blended = []
    for one, other, first, last in zip(values, others, before[1:], after[1:], strict=True):
        floor, ceiling = first.value**2, last.value**2
        one, other = min(max(one, floor), ceiling), min(max(other, floor), ceiling)
        blended.append(one + share * (other - one))
    return blended[0], blended[1]
