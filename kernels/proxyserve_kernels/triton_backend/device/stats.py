"""K1: fuse and reduce. Every logit is read once; what is written is a few floats per block of 256 tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from proxyserve_kernels.triton_backend.device.layout import (
    FILTERED,
    FLAGS,
    GAP_SUM,
    KEPT_MAX,
    KEPT_SUM,
    LOG2E,
    MASK_WORDS,
    PROCESSED,
    PROCESSED_MAX,
    PROCESSED_SUM,
    RAW_MAX,
    RAW_SUM,
    REFERENCE_MAX,
    REFERENCE_SUM,
    REMOVED_BY,
    REMOVED_SUM,
    SCALE,
    WIDTH,
)
from proxyserve_kernels.triton_backend.device.tiles import (
    adjusted_tile,
    allowed_tile,
    block_mass,
    block_offsets,
    fused_tile,
    law_tile,
)


@triton.jit(do_not_specialize=["int_stride", "float_stride", "blocks", "plane"])
def fuse_stats(
    ints,
    floats,
    stats,
    int_stride,
    float_stride,
    blocks,
    plane,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    LAWS: tl.constexpr,
    GENERAL: tl.constexpr,
    ADJUST: tl.constexpr,
    SCALED: tl.constexpr,
    COMPARE: tl.constexpr,
):
    """Grid (rows, tiles of TILE blocks). Writes, per block, maximum and sum of exp(score - maximum) of the raw, the
    processed (before filters) and the reference law, the moment for KL(raw || reference), and of the raw sum what the
    mask of REMOVED_BY rules out.

    `stats` float32 [PLANES, rows, blocks] with `plane` entries per plane."""
    row = tl.program_id(0).to(tl.int64)
    ints += row * int_stride
    floats += row * float_stride
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    offsets = block_offsets(block)
    score, reference = fused_tile(ints, floats, offsets, KIND, TERMS, LAWS, GENERAL)
    out = stats + row * blocks + block
    here = block < blocks
    peak = tl.max(score, axis=1)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2((score - safe[:, None]) * LOG2E)
    mass = tl.sum(weight, axis=1)
    tl.store(out + RAW_MAX * plane, peak, mask=here)
    tl.store(out + RAW_SUM * plane, mass, mask=here)
    if COMPARE:
        gap = tl.where(weight == 0.0, 0.0, weight * (score - reference))
        tl.store(out + GAP_SUM * plane, tl.sum(gap, axis=1), mask=here)
        reference_peak = tl.max(reference, axis=1)
        tl.store(out + REFERENCE_MAX * plane, reference_peak, mask=here)
        tl.store(out + REFERENCE_SUM * plane, block_mass(reference, reference_peak), mask=here)
    if ADJUST:
        removed = tl.zeros([TILE], tl.float32)
        removed_by = tl.load(ints + REMOVED_BY)
        if removed_by != 0:
            allowed = allowed_tile(removed_by, tl.load(ints + MASK_WORDS), offsets)
            removed = tl.sum(tl.where(allowed, 0.0, weight), axis=1)
        tl.store(out + REMOVED_SUM * plane, removed, mask=here)
        score = adjusted_tile(ints, floats, offsets, score)
    if SCALED:
        score = score * tl.load(floats + SCALE)
    if ADJUST or SCALED:
        peak = tl.max(score, axis=1)
        mass = block_mass(score, peak)
    tl.store(out + PROCESSED_MAX * plane, peak, mask=here)
    tl.store(out + PROCESSED_SUM * plane, mass, mask=here)


@triton.jit(do_not_specialize=["int_stride", "float_stride", "blocks", "plane"])
def filter_blocks(
    ints,
    floats,
    stats,
    thresholds,
    lasts,
    int_stride,
    float_stride,
    blocks,
    plane,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    LAWS: tl.constexpr,
    GENERAL: tl.constexpr,
    ADJUST: tl.constexpr,
):
    """Grid (rows, tiles). Block statistics of what the filters keep; blocks with nothing kept are not read again."""
    row = tl.program_id(0).to(tl.int64)
    ints += row * int_stride
    floats += row * float_stride
    if (tl.load(ints + FLAGS) & FILTERED) == 0:
        return
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = block < blocks
    out = stats + row * blocks + block
    threshold = tl.load(thresholds + row)
    best = tl.load(out + PROCESSED_MAX * plane, mask=here, other=float("-inf"))
    peak = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    if tl.max(best, axis=0) >= threshold:
        offsets = block_offsets(block)
        score = law_tile(ints, floats, offsets, PROCESSED, KIND, TERMS, LAWS, GENERAL, ADJUST)
        last = tl.load(lasts + row)
        kept = (score > threshold) | ((score == threshold) & (offsets <= last))
        score = tl.where(kept | (score != score), score, float("-inf"))
        peak = tl.max(score, axis=1)
        mass = block_mass(score, peak)
    tl.store(out + KEPT_MAX * plane, peak, mask=here)
    tl.store(out + KEPT_SUM * plane, mass, mask=here)


@triton.jit(do_not_specialize=["int_stride", "float_stride", "out_stride"])
def write_scores(
    ints,
    floats,
    out,
    int_stride,
    float_stride,
    out_stride,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    LAWS: tl.constexpr,
    GENERAL: tl.constexpr,
):
    """Grid (rows, tiles). Writes the fused scores out, for a caller who asks: float32 [rows, out_stride]."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    offsets = block_offsets(block)
    score, _ = fused_tile(
        ints + row * int_stride, floats + row * float_stride, offsets, KIND, TERMS, LAWS, GENERAL
    )
    tl.store(out + row * out_stride + offsets, score, mask=offsets < out_stride)


@triton.jit(do_not_specialize=["int_stride", "float_stride", "count"])
def listed_logprobs(
    ints,
    floats,
    partitions,
    listed,
    out,
    int_stride,
    float_stride,
    count,
    TOGETHER: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    LAWS: tl.constexpr,
    GENERAL: tl.constexpr,
):
    """Grid (rows, groups of TOGETHER tokens). Raw log-probs of the tokens `listed` int64 [rows, count], from the rows'
    log-partitions: `out` float32 [rows, count], -inf for -1 and for a token beyond the row's width."""
    row = tl.program_id(0).to(tl.int64)
    ints += row * int_stride
    floats += row * float_stride
    if tl.load(ints + WIDTH) == 0:
        return
    place = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    token = tl.load(listed + row * count + place, mask=place < count, other=-1)
    # An id too large for int32 is beyond every width; -1 reads token 0 and is put right below.
    offsets = tl.minimum(tl.maximum(token, 0), 0x7FFFFFFF).to(tl.int32)
    score, _ = fused_tile(ints, floats, offsets[None, :], KIND, TERMS, LAWS, GENERAL)
    logprob = tl.sum(score, axis=0) - tl.load(partitions + row)
    tl.store(out + row * count + place, tl.where(token < 0, float("-inf"), logprob), mask=place < count)


@triton.jit(do_not_specialize=["int_stride", "float_stride", "blocks"])
def count_before(
    ints,
    floats,
    tokens,
    scores,
    counts,
    int_stride,
    float_stride,
    blocks,
    LAW: tl.constexpr,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    LAWS: tl.constexpr,
    GENERAL: tl.constexpr,
    ADJUST: tl.constexpr,
):
    """Grid (rows, tiles). How many tokens of each block come before the row's token: `counts` int32 [rows, blocks]."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    offsets = block_offsets(block)
    score = law_tile(
        ints + row * int_stride, floats + row * float_stride, offsets, LAW, KIND, TERMS, LAWS, GENERAL, ADJUST
    )
    token, own = tl.load(tokens + row), tl.load(scores + row)
    earlier = (score > own) | ((score == own) & (offsets < token))
    tl.store(counts + row * blocks + block, tl.sum(earlier.to(tl.int32), axis=1), mask=block < blocks)
