"""K2: one program per row chooses the token from the block statistics and a few blocks that it reads again."""

from __future__ import annotations

import triton
import triton.language as tl

from proxyserve_kernels.philox import STREAM_BLOCK as _STREAM_BLOCK
from proxyserve_kernels.philox import STREAM_TOKEN as _STREAM_TOKEN
from proxyserve_kernels.triton_backend.device.layout import (
    FILTERED,
    FLAGS,
    FORCED,
    GAP_SUM,
    GREEDY,
    KEPT_MAX,
    LOG2E,
    POSITION,
    PROCESSED,
    PROCESSED_MAX,
    RAW,
    RAW_MAX,
    REFERENCE_MAX,
    REMOVED_SUM,
    SEED,
    TOKENS,
    WIDTH,
)
from proxyserve_kernels.triton_backend.device.noise import gumbel
from proxyserve_kernels.triton_backend.device.tiles import fused_tile, law_tile

STREAM_BLOCK, STREAM_TOKEN = tl.constexpr(_STREAM_BLOCK), tl.constexpr(_STREAM_TOKEN)


@triton.jit
def row_partition(maxima, sums):
    """(peak, log-partition) of a row, float32, from its block statistics, always in the same order."""
    peak = tl.max(maxima, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.sum((sums * tl.exp2((maxima - safe) * LOG2E)).to(tl.float64), axis=0)
    return peak, (safe + tl.log(mass)).to(tl.float32)


@triton.jit
def best_of(score, offsets):
    """Lowest id with the highest score of [256] tokens."""
    top = tl.max(score, axis=0)
    return tl.min(tl.where(score == top, offsets, 0x7FFFFFFF), axis=0)


@triton.jit
def best_block(values, BLOCKS: tl.constexpr):
    """Lowest index with the highest of `values` [BLOCKS]; 0 if there is none (all NaN)."""
    top = tl.max(values, axis=0)
    index = tl.min(tl.where(values == top, tl.arange(0, BLOCKS), BLOCKS), axis=0)
    return tl.where(index == BLOCKS, 0, index)


@triton.jit(do_not_specialize=["int_stride", "float_stride", "blocks", "plane"])
def pick(
    ints,
    floats,
    stats,
    thresholds,
    lasts,
    tokens,
    valid,
    kl,
    flips,
    subjects,
    raw_scores,
    raw_logprobs,
    processed_scores,
    processed_logprobs,
    raw_partitions,
    processed_partitions,
    removed,
    int_stride,
    float_stride,
    blocks,
    plane,
    BLOCKS: tl.constexpr,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    LAWS: tl.constexpr,
    GENERAL: tl.constexpr,
    ADJUST: tl.constexpr,
    COMPARE: tl.constexpr,
):
    """Grid (rows). Writes the token (-1 for a bad row), and of the reported token (`subjects`) score and log-prob under
    both laws; the partitions are in nats; for adjusted batches the removed mass. BLOCKS is a power of two, at least the
    number of `blocks`."""
    row = tl.program_id(0).to(tl.int64)
    ints += row * int_stride
    floats += row * float_stride
    if tl.load(ints + WIDTH) == 0:
        return
    block = tl.arange(0, BLOCKS)
    here = block < blocks
    stats += row * blocks
    flags = tl.load(ints + FLAGS)
    greedy = (flags & GREEDY) != 0
    filtered = ((flags & FILTERED) != 0) & (greedy == 0)

    raw_maxima = tl.load(stats + RAW_MAX * plane + block, mask=here, other=float("-inf"))
    raw_sums = tl.load(stats + (RAW_MAX + 1) * plane + block, mask=here, other=0.0)
    _, raw_partition = row_partition(raw_maxima, raw_sums)
    plane_of = tl.where(filtered, KEPT_MAX, PROCESSED_MAX)
    maxima = tl.load(stats + plane_of * plane + block, mask=here, other=float("-inf"))
    sums = tl.load(stats + (plane_of + 1) * plane + block, mask=here, other=0.0)
    peak, partition = row_partition(maxima, sums)
    # A NaN may hide from a maximum, never from a sum. Filters keep the best token, so they cannot empty a row.
    fine = (partition == partition) & (peak > float("-inf")) & (peak < float("inf"))
    # Blocks that filters leave out are not looked at again, so a NaN in them shows only in the sums before filters.
    before = tl.sum(tl.load(stats + (PROCESSED_MAX + 1) * plane + block, mask=here, other=0.0), axis=0)
    fine = fine & (before == before)

    seed, position = tl.load(ints + SEED), tl.load(ints + POSITION).to(tl.int32)
    noisy = maxima + tl.log(sums) + gumbel(seed, position, STREAM_BLOCK, 0, BLOCKS)
    noisy = tl.where((sums > 0.0) & here, noisy, float("-inf"))
    chosen = best_block(tl.where(greedy, maxima, noisy), BLOCKS)
    inside = tl.arange(0, TOKENS)
    offsets = chosen * TOKENS + inside
    score = tl.sum(
        law_tile(ints, floats, offsets[None, :], PROCESSED, KIND, TERMS, LAWS, GENERAL, ADJUST), axis=0
    )
    threshold = tl.where(filtered, tl.load(thresholds + row), float("-inf"))
    last = tl.where(filtered, tl.load(lasts + row), 0x7FFFFFFF)
    kept = (score > threshold) | ((score == threshold) & (offsets <= last))
    noise = gumbel(seed, position, STREAM_TOKEN, chosen * TOKENS, TOKENS)
    token = best_of(tl.where(greedy, score, tl.where(kept, score + noise, float("-inf"))), offsets)
    token = tl.where(fine, token, -1)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(valid + row, fine)

    forced = tl.load(ints + FORCED).to(tl.int32)
    subject = tl.where(forced >= 0, forced, token)
    tl.store(subjects + row, subject.to(tl.int64))
    block_of = tl.maximum(subject, 0) // TOKENS
    offsets = block_of * TOKENS + inside
    at = offsets == subject
    raw = law_tile(ints, floats, offsets[None, :], RAW, KIND, TERMS, LAWS, GENERAL, ADJUST)
    raw_score = tl.max(tl.where(at, tl.sum(raw, axis=0), float("-inf")), axis=0)
    processed = law_tile(ints, floats, offsets[None, :], PROCESSED, KIND, TERMS, LAWS, GENERAL, ADJUST)
    processed_score = tl.max(tl.where(at, tl.sum(processed, axis=0), float("-inf")), axis=0)
    is_kept = (processed_score > threshold) | ((processed_score == threshold) & (subject <= last))
    # A greedy row's law is all on its token.
    certain = tl.where(subject == token, 0.0, float("-inf"))
    processed_logprob = tl.where(is_kept, processed_score - partition, float("-inf"))
    tl.store(raw_scores + row, raw_score)
    tl.store(raw_logprobs + row, raw_score - raw_partition)
    tl.store(processed_scores + row, processed_score)
    tl.store(processed_logprobs + row, tl.where(greedy, certain, processed_logprob))
    tl.store(raw_partitions + row, raw_partition)
    tl.store(processed_partitions + row, partition)

    if ADJUST:
        lost = tl.load(stats + REMOVED_SUM * plane + block, mask=here, other=0.0)
        # The sums of some tokens and of all, made in one order: the quotient is at most 1.
        raw_peak = tl.max(raw_maxima, axis=0)
        safe = tl.where(raw_peak == float("-inf"), 0.0, raw_peak)
        scale = tl.exp2((raw_maxima - safe) * LOG2E)
        whole = tl.sum((raw_sums * scale).to(tl.float64), axis=0)
        tl.store(removed + row, (tl.sum((lost * scale).to(tl.float64), axis=0) / whole).to(tl.float32))

    if COMPARE:
        reference_maxima = tl.load(stats + REFERENCE_MAX * plane + block, mask=here, other=float("-inf"))
        reference_sums = tl.load(stats + (REFERENCE_MAX + 1) * plane + block, mask=here, other=0.0)
        _, reference_partition = row_partition(reference_maxima, reference_sums)
        gaps = tl.load(stats + GAP_SUM * plane + block, mask=here, other=0.0)
        # KL = E_fused[fused - reference] - log Z_fused + log Z_reference
        scale = tl.where(raw_maxima == float("-inf"), 0.0, tl.exp2((raw_maxima - raw_partition) * LOG2E))
        moved = tl.sum((gaps * scale).to(tl.float64), axis=0).to(tl.float32)
        divergence = moved - raw_partition + reference_partition
        tl.store(kl + row, tl.where(divergence < 0.0, 0.0, divergence))

        offsets = best_block(raw_maxima, BLOCKS) * TOKENS + inside
        score, _ = fused_tile(ints, floats, offsets[None, :], KIND, TERMS, LAWS, GENERAL)
        fused_best = best_of(tl.sum(score, axis=0), offsets)
        offsets = best_block(reference_maxima, BLOCKS) * TOKENS + inside
        _, reference = fused_tile(ints, floats, offsets[None, :], KIND, TERMS, LAWS, GENERAL)
        tl.store(flips + row, fused_best != best_of(tl.sum(reference, axis=0), offsets))
    else:
        tl.store(kl + row, 0.0)
        tl.store(flips + row, False)
