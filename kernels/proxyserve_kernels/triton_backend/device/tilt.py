"""Statistics of the tilted law, and one step of the solver; formulas in `proxyserve_kernels.tilt`."""

from __future__ import annotations

import triton
import triton.language as tl

from proxyserve_kernels.triton_backend.device.layout import (
    BASE,
    CLIP_AT,
    FLOATS_PER_TERM,
    INTS_PER_TERM,
    LOG2E,
    TERM_FLOATS,
    TERM_INTS,
    WIDTH,
)
from proxyserve_kernels.triton_backend.device.tiles import block_offsets, delta_tile, load_lane

# Values of `proxyserve_kernels.tilt.Match` that the solver tells apart.
REVERSE, BOTH = tl.constexpr(2), tl.constexpr(3)

# Rows of the solver's state, float64 [STATE, rows].
LOW, HIGH, AT, DONE, CLAMPED, FORWARD_AT, REVERSE_AT = (
    tl.constexpr(0),
    tl.constexpr(1),
    tl.constexpr(2),
    tl.constexpr(3),
    tl.constexpr(4),
    tl.constexpr(5),
    tl.constexpr(6),
)
STATE = 7

# A row is done when its divergence is this close to the target, relative to it, or its multiplier moves less; or this
# close in nats: sums of float32 know no better.
TOLERANCE, NOISE = tl.constexpr(1e-5), tl.constexpr(1e-7)


@triton.jit
def base_tile(ints, offsets, KIND: tl.constexpr):
    """The base's scores, -inf from the row's width on."""
    width = tl.load(ints + WIDTH).to(tl.int32)
    base = load_lane(tl.load(ints + BASE), tl.load(ints + BASE + 1), offsets, width, float("-inf"), KIND)
    return tl.where(offsets < width, base, float("-inf"))


@triton.jit
def single_delta(ints, floats, offsets, base, term: tl.constexpr, KIND: tl.constexpr):
    """One term's delta without its weight; 0 where the base is -inf, for there P has no mass."""
    width = tl.load(ints + WIDTH).to(tl.int32)
    delta = delta_tile(ints, floats, offsets, width, term, KIND, False)
    return tl.where(base == float("-inf"), 0.0, delta)


@triton.jit(do_not_specialize=["int_stride", "float_stride", "blocks", "plane", "columns"])
def tilt_stats(
    ints,
    floats,
    multipliers,
    centres,
    done,
    out,
    int_stride,
    float_stride,
    blocks,
    plane,
    columns,
    TILE: tl.constexpr,
    POINTS: tl.constexpr,
    MOMENTS: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Grid (rows, tiles). Per block and multiplier: maximum of base + a * d, then the sums of exp(that - maximum) *
    d^m for m = 0 .. MOMENTS, d the row's weighted delta less `centres` float64 [rows]. Rows that are `done` (float64,
    not 0) leave at once.

    `multipliers` float64 [rows, columns], of which POINTS are used; `out` float32 [POINTS, 2 + MOMENTS, rows, blocks]
    with `plane` entries per plane."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(done + row) != 0.0:
        return
    ints += row * int_stride
    floats += row * float_stride
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = block < blocks
    offsets = block_offsets(block)
    base = base_tile(ints, offsets, KIND)
    delta = tl.zeros(offsets.shape, tl.float32) - tl.load(centres + row).to(tl.float32)
    for term in tl.static_range(TERMS):
        weight = tl.load(floats + TERM_FLOATS + FLOATS_PER_TERM * term)
        delta = tl.fma(weight, single_delta(ints, floats, offsets, base, term, KIND), delta)
    delta = tl.where(base == float("-inf"), 0.0, delta)
    out += row * blocks + block
    for point in tl.static_range(POINTS):
        a = tl.load(multipliers + row * columns + point).to(tl.float32)
        exponent = tl.fma(a, delta, base)
        peak = tl.max(exponent, axis=1)
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        moment = tl.exp2((exponent - safe[:, None]) * LOG2E)
        planes = out + point * (2 + MOMENTS) * plane
        tl.store(planes, peak, mask=here)
        tl.store(planes + plane, tl.sum(moment, axis=1), mask=here)
        for order in tl.static_range(MOMENTS):
            moment = moment * delta
            tl.store(planes + (2 + order) * plane, tl.sum(moment, axis=1), mask=here)


@triton.jit
def row_moments(planes, plane, block, here):
    """(log of the sum, mean, variance, third central moment), float64, of one row's blocks at one multiplier."""
    maxima = tl.load(planes + block, mask=here, other=float("-inf"))
    peak = tl.max(maxima, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    scale = tl.exp2((maxima - safe) * LOG2E)
    zero = tl.sum((tl.load(planes + plane + block, mask=here, other=0.0) * scale).to(tl.float64), axis=0)
    one = (
        tl.sum((tl.load(planes + 2 * plane + block, mask=here, other=0.0) * scale).to(tl.float64), axis=0)
        / zero
    )
    two = (
        tl.sum((tl.load(planes + 3 * plane + block, mask=here, other=0.0) * scale).to(tl.float64), axis=0)
        / zero
    )
    three = (
        tl.sum((tl.load(planes + 4 * plane + block, mask=here, other=0.0) * scale).to(tl.float64), axis=0)
        / zero
    )
    variance = two - one * one
    variance = tl.where(variance < 0.0, 0.0, variance)
    third = three - 3 * one * two + 2 * one * one * one
    return safe.to(tl.float64) + tl.log(zero), one, variance, third


@triton.jit(do_not_specialize=["blocks", "plane", "rows"])
def gather_moments(planes, out, blocks, plane, rows, BLOCKS: tl.constexpr):
    """Grid (rows). One multiplier's moments: `out` float64 [4, rows]."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    log_sum, mean, variance, third = row_moments(planes + row * blocks, plane, block, block < blocks)
    tl.store(out + row, log_sum)
    tl.store(out + rows + row, mean)
    tl.store(out + 2 * rows + row, variance)
    tl.store(out + 3 * rows + row, third)


@triton.jit(do_not_specialize=["blocks", "plane", "rows", "points"])
def gather_grid(planes, out, blocks, plane, rows, points, BLOCKS: tl.constexpr):
    """Grid (rows, points). Log of the sum and mean at each point of a grid: `out` float64 [2, rows, points]."""
    row = tl.program_id(0).to(tl.int64)
    point = tl.program_id(1)
    block = tl.arange(0, BLOCKS)
    here = block < blocks
    planes += point * 3 * plane + row * blocks
    maxima = tl.load(planes + block, mask=here, other=float("-inf"))
    peak = tl.max(maxima, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    scale = tl.exp2((maxima - safe) * LOG2E)
    zero = tl.sum((tl.load(planes + plane + block, mask=here, other=0.0) * scale).to(tl.float64), axis=0)
    one = tl.sum((tl.load(planes + 2 * plane + block, mask=here, other=0.0) * scale).to(tl.float64), axis=0)
    tl.store(out + row * points + point, safe.to(tl.float64) + tl.log(zero))
    tl.store(out + rows * points + row * points + point, one / zero)


@triton.jit
def step_to(value, slope, bend, target):
    """The step at which value(a) is `target`, given value' and value'', its root continued as in `torch_backend.roots`;
    infinite where it never is."""
    root = tl.sqrt(tl.where(value < 1e-30, 1e-30, value))
    first = slope / (2 * root)
    first = tl.where(first < 1e-30, 1e-30, first)
    gap = (tl.sqrt(tl.where(target < 0.0, 0.0, target)) - root) / first
    rate = (first - 0.5 * bend / first) / root
    left = 1 - rate * gap
    straight = tl.abs(rate * gap) < 1e-8
    far = tl.where(gap < 0.0, float("-inf"), float("inf"))
    bent = -tl.log(tl.where(left > 0.0, left, 1.0)) / tl.where(straight, 1.0, rate)
    return tl.where(straight, gap, tl.where(left > 0.0, bent, far))


@triton.jit(do_not_specialize=["blocks", "plane", "rows"])
def solve_step(
    planes,
    partitions,
    state,
    matches,
    limits,
    forward_targets,
    reverse_targets,
    blocks,
    plane,
    rows,
    BLOCKS: tl.constexpr,
):
    """Grid (rows). One safeguarded step from the moments at the state's multiplier, inside a bracket: to the root as
    continued, or for BOTH Newton's on the derivative of its objective. `partitions` float64 are those of the base;
    `state` float64 [STATE, pitch], `rows` its pitch."""
    row = tl.program_id(0).to(tl.int64)
    state += row
    if tl.load(state + DONE * rows) != 0.0:
        return
    block = tl.arange(0, BLOCKS)
    log_sum, mean, variance, third = row_moments(planes + row * blocks, plane, block, block < blocks)
    log_mass = log_sum - tl.load(partitions + row)
    low, high = tl.load(state + LOW * rows), tl.load(state + HIGH * rows)
    a, limit = tl.load(state + AT * rows), tl.load(limits + row)
    match = tl.load(matches + row)
    forward_target, reverse_target = tl.load(forward_targets + row), tl.load(reverse_targets + row)

    value_f, value_r = a * mean - log_mass, log_mass
    slope_f, slope_r = a * variance, mean
    bend_f, bend_r = variance + a * third, variance
    backward = match == REVERSE
    both = match == BOTH
    target = tl.where(backward, reverse_target, forward_target)
    value = tl.where(backward, value_r, value_f)
    step = step_to(value, tl.where(backward, slope_r, slope_f), tl.where(backward, bend_r, bend_f), target)
    too_low = value < target
    near = tl.abs(value - target) <= target * TOLERANCE + NOISE
    gap_f, gap_r = value_f - forward_target, value_r - reverse_target
    descent = gap_f * slope_f + gap_r * slope_r
    curvature = slope_f * slope_f + slope_r * slope_r + gap_f * bend_f + gap_r * bend_r
    newton = tl.where(curvature > 0.0, -descent / curvature, float("inf"))
    step = tl.where(both, newton, step)
    too_low = tl.where(both, descent < 0.0, too_low)
    near_f = tl.abs(gap_f) <= forward_target * TOLERANCE + NOISE
    near_r = tl.abs(gap_r) <= reverse_target * TOLERANCE + NOISE
    near = tl.where(both, near_f & near_r, near)
    new_low, new_high = tl.where(too_low, a, low), tl.where(too_low, high, a)
    reached = too_low & (a >= limit) & (near == 0)
    new = a + step
    inside = (new > new_low) & (new < new_high)
    beyond = too_low & (inside == 0) & (new >= new_high) & (new_high >= limit)
    new = tl.where(inside, new, tl.where(beyond, limit, 0.5 * (new_low + new_high)))
    small = inside & (tl.abs(new - a) <= a * TOLERANCE)
    stop = near | reached | small | ((new_high - new_low) <= new_high * TOLERANCE)
    new = tl.where(near | reached, a, new)
    moved = new - a
    tl.store(state + LOW * rows, new_low)
    tl.store(state + HIGH * rows, new_high)
    tl.store(state + AT * rows, new)
    tl.store(state + DONE * rows, tl.where(stop, 1.0, 0.0).to(tl.float64))
    tl.store(state + CLAMPED * rows, tl.where(reached, 1.0, 0.0).to(tl.float64))
    tl.store(state + FORWARD_AT * rows, value_f + moved * (slope_f + 0.5 * moved * bend_f))
    tl.store(state + REVERSE_AT * rows, value_r + moved * (slope_r + 0.5 * moved * bend_r))


@triton.jit(do_not_specialize=["int_stride", "float_stride", "blocks", "plane"])
def pair_stats(
    ints,
    floats,
    out,
    int_stride,
    float_stride,
    blocks,
    plane,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Grid (rows, tiles). Per term and block, for the positive and then the negative row: maximum; sum of exp(score -
    maximum); the same weighted with positive - negative, over tokens that both have; and over tokens that only this
    one has. `out` float32 [TERMS, 8, rows, blocks]."""
    row = tl.program_id(0).to(tl.int64)
    ints += row * int_stride
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = block < blocks
    offsets = block_offsets(block)
    width = tl.load(ints + WIDTH).to(tl.int32)
    out += row * blocks + block
    for term in tl.static_range(TERMS):
        entry = ints + TERM_INTS + INTS_PER_TERM * term
        positive = load_lane(tl.load(entry), tl.load(entry + 1), offsets, width, float("-inf"), KIND)
        negative = load_lane(tl.load(entry + 2), tl.load(entry + 3), offsets, width, float("-inf"), KIND)
        positive = tl.where(offsets < width, positive, float("-inf"))
        negative = tl.where(offsets < width, negative, float("-inf"))
        shared = (positive != float("-inf")) & (negative != float("-inf"))
        delta = tl.where(shared, positive - negative, 0.0)
        for side in tl.static_range(2):
            score = positive if side == 0 else negative
            peak = tl.max(score, axis=1)
            safe = tl.where(peak == float("-inf"), 0.0, peak)
            weight = tl.exp2((score - safe[:, None]) * LOG2E)
            planes = out + (8 * term + 4 * side) * plane
            tl.store(planes, peak, mask=here)
            tl.store(planes + plane, tl.sum(weight, axis=1), mask=here)
            tl.store(planes + 2 * plane, tl.sum(weight * delta, axis=1), mask=here)
            tl.store(planes + 3 * plane, tl.sum(tl.where(shared, 0.0, weight), axis=1), mask=here)


@triton.jit
def side_moments(planes, plane, block, here):
    """(log-partition, E[delta; shared], mass of what only this row has), float64."""
    maxima = tl.load(planes + block, mask=here, other=float("-inf"))
    peak = tl.max(maxima, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    scale = tl.exp2((maxima - safe) * LOG2E)
    zero = tl.sum((tl.load(planes + plane + block, mask=here, other=0.0) * scale).to(tl.float64), axis=0)
    one = tl.sum((tl.load(planes + 2 * plane + block, mask=here, other=0.0) * scale).to(tl.float64), axis=0)
    own = tl.sum((tl.load(planes + 3 * plane + block, mask=here, other=0.0) * scale).to(tl.float64), axis=0)
    return safe.to(tl.float64) + tl.log(zero), one / zero, own / zero


@triton.jit(do_not_specialize=["int_stride", "float_stride", "blocks", "plane", "terms"])
def gather_pairs(
    ints,
    floats,
    planes,
    forward,
    reverse,
    int_stride,
    float_stride,
    blocks,
    plane,
    terms,
    BLOCKS: tl.constexpr,
):
    """Grid (rows, terms). KL(positive || negative) and KL(negative || positive), float32 [rows, terms]; 0 where the row
    has no such term or it has no negative."""
    row = tl.program_id(0).to(tl.int64)
    term = tl.program_id(1)
    entry = ints + row * int_stride + TERM_INTS + INTS_PER_TERM * term
    out = row * terms + term
    if (tl.load(entry) == 0) | (tl.load(entry + 2) == 0):
        tl.store(forward + out, 0.0)
        tl.store(reverse + out, 0.0)
        return
    block = tl.arange(0, BLOCKS)
    here = block < blocks
    planes += 8 * term * plane + row * blocks
    clip = tl.load(floats + row * float_stride + CLIP_AT).to(tl.float64)
    positive, gain, gained = side_moments(planes, plane, block, here)
    negative, loss, lost = side_moments(planes + 4 * plane, plane, block, here)
    shift = positive - negative
    # E[delta] of the normalised rows; a token that only one of them has counts as clip.
    tl.store(forward + out, (gain - shift * (1.0 - gained) + clip * gained).to(tl.float32))
    tl.store(reverse + out, (clip * lost - loss + shift * (1.0 - lost)).to(tl.float32))


@triton.jit(do_not_specialize=["int_stride", "float_stride", "blocks", "plane"])
def moment_stats(
    ints,
    floats,
    centres,
    out,
    int_stride,
    float_stride,
    blocks,
    plane,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Grid (rows, tiles). Of exp(base + weights . D), D the terms' deltas less `centres` float64 [rows, TERMS]: per
    block the maximum, the sum, its first moments, its second moments (i, j <= i) in turn; float32 planes."""
    row = tl.program_id(0).to(tl.int64)
    ints += row * int_stride
    floats += row * float_stride
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = block < blocks
    offsets = block_offsets(block)
    base = base_tile(ints, offsets, KIND)
    exponent = base
    for term in tl.static_range(TERMS):
        weight = tl.load(floats + TERM_FLOATS + FLOATS_PER_TERM * term)
        delta = centred_delta(ints, floats, centres + row * TERMS, offsets, base, term, KIND)
        exponent = tl.fma(weight, delta, exponent)
    peak = tl.max(exponent, axis=1)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2((exponent - safe[:, None]) * LOG2E)
    out += row * blocks + block
    tl.store(out, peak, mask=here)
    tl.store(out + plane, tl.sum(weight, axis=1), mask=here)
    for i in tl.static_range(TERMS):
        first = weight * centred_delta(ints, floats, centres + row * TERMS, offsets, base, i, KIND)
        tl.store(out + (2 + i) * plane, tl.sum(first, axis=1), mask=here)
        for j in tl.static_range(i + 1):
            second = first * centred_delta(ints, floats, centres + row * TERMS, offsets, base, j, KIND)
            at = 2 + TERMS + i * (i + 1) // 2 + j
            tl.store(out + at * plane, tl.sum(second, axis=1), mask=here)


@triton.jit
def centred_delta(ints, floats, centres, offsets, base, term: tl.constexpr, KIND: tl.constexpr):
    """One term's delta less its centre, also of a term with weight 0; 0 where the base is -inf."""
    entry = ints + TERM_INTS + INTS_PER_TERM * term
    width = tl.load(ints + WIDTH).to(tl.int32)
    positive = load_lane(tl.load(entry), tl.load(entry + 1), offsets, width, 0.0, KIND)
    negative = load_lane(tl.load(entry + 2), tl.load(entry + 3), offsets, width, 0.0, KIND)
    clip = tl.load(floats + CLIP_AT)
    lost = positive == float("-inf")
    gained = negative == float("-inf")
    only_negative, only_positive = tl.fma(negative, 0.0, -clip), tl.fma(positive, 0.0, clip)
    delta = tl.where(
        lost, tl.where(gained, 0.0, only_negative), tl.where(gained, only_positive, positive - negative)
    )
    delta -= tl.load(centres + term).to(tl.float32)
    return tl.where(base == float("-inf"), 0.0, delta)


@triton.jit(do_not_specialize=["blocks", "plane", "planes_per_row"])
def gather_sums(planes, out, blocks, plane, planes_per_row, BLOCKS: tl.constexpr):
    """Grid (rows, planes_per_row - 1). Row sums over the maximum of plane 0: `out` float64 [rows, planes_per_row] holds
    the log of the sum of plane 1, then the sums of the others divided by it."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1) + 1
    block = tl.arange(0, BLOCKS)
    here = block < blocks
    planes += row * blocks
    maxima = tl.load(planes + block, mask=here, other=float("-inf"))
    peak = tl.max(maxima, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    scale = tl.exp2((maxima - safe) * LOG2E)
    mass = tl.sum((tl.load(planes + plane + block, mask=here, other=0.0) * scale).to(tl.float64), axis=0)
    moment = tl.sum(
        (tl.load(planes + which * plane + block, mask=here, other=0.0) * scale).to(tl.float64), axis=0
    )
    value = tl.where(which == 1, safe.to(tl.float64) + tl.log(mass), moment / mass)
    tl.store(out + row * planes_per_row + which, value)
