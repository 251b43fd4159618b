"""Draw from max(p - q, 0): what is left of the target's processed law where a draft did not stand."""

from __future__ import annotations

import triton
import triton.language as tl

from proxyserve_kernels.philox import STREAM_RESIDUAL_BLOCK as _STREAM_BLOCK
from proxyserve_kernels.philox import STREAM_RESIDUAL_TOKEN as _STREAM_TOKEN
from proxyserve_kernels.triton_backend.device.layout import (
    FILTERED,
    FLAGS,
    GREEDY,
    LOG2E,
    POSITION,
    PROCESSED,
    SEED,
    TOKENS,
)
from proxyserve_kernels.triton_backend.device.noise import gumbel
from proxyserve_kernels.triton_backend.device.pick import best_block, best_of
from proxyserve_kernels.triton_backend.device.tiles import block_offsets, law_tile

STREAM_BLOCK, STREAM_TOKEN = tl.constexpr(_STREAM_BLOCK), tl.constexpr(_STREAM_TOKEN)


@triton.jit
def probability_tile(
    ints,
    floats,
    offsets,
    partition,
    threshold,
    last,
    token,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    LAWS: tl.constexpr,
    GENERAL: tl.constexpr,
    ADJUST: tl.constexpr,
):
    """Probabilities under the processed law of a row whose pick found these values; `token` is its best if greedy."""
    score = law_tile(ints, floats, offsets, PROCESSED, KIND, TERMS, LAWS, GENERAL, ADJUST)
    flags = tl.load(ints + FLAGS)
    filtered = (flags & FILTERED) != 0
    bar = tl.where(filtered, threshold, float("-inf"))
    end = tl.where(filtered, last, 0x7FFFFFFF)
    kept = (score > bar) | ((score == bar) & (offsets <= end))
    p = tl.where(kept, tl.exp2((score - partition) * LOG2E), 0.0)
    return tl.where((flags & GREEDY) != 0, tl.where(offsets == token, 1.0, 0.0), p)


@triton.jit
def residual_tile(
    p_ints, p_floats, p_values, q_ints, q_floats, q_values, row, draft, offsets,
    p_stride, q_stride,
    KIND: tl.constexpr, TERMS: tl.constexpr, LAWS: tl.constexpr, GENERAL: tl.constexpr, ADJUST: tl.constexpr,
    Q_KIND: tl.constexpr, Q_TERMS: tl.constexpr, Q_LAWS: tl.constexpr, Q_GENERAL: tl.constexpr,
):  # fmt: skip
    """max(p - q, 0) at `offsets`. `*_values` float64 [4, rows]: partition, threshold, last kept id, token. ADJUST if
    either law has adjustments: for one that has none it changes no bit."""
    p = probability_tile(
        p_ints, p_floats, offsets,
        tl.load(p_values + row).to(tl.float32), tl.load(p_values + p_stride + row).to(tl.float32),
        tl.load(p_values + 2 * p_stride + row).to(tl.int32), tl.load(p_values + 3 * p_stride + row).to(tl.int32),
        KIND, TERMS, LAWS, GENERAL, ADJUST,
    )  # fmt: skip
    q = probability_tile(
        q_ints, q_floats, offsets,
        tl.load(q_values + draft).to(tl.float32), tl.load(q_values + q_stride + draft).to(tl.float32),
        tl.load(q_values + 2 * q_stride + draft).to(tl.int32), tl.load(q_values + 3 * q_stride + draft).to(tl.int32),
        Q_KIND, Q_TERMS, Q_LAWS, Q_GENERAL, ADJUST,
    )  # fmt: skip
    return tl.where(p > q, p - q, 0.0)


@triton.jit(do_not_specialize=["p_int_stride", "p_float_stride", "q_int_stride", "q_float_stride", "p_stride",
                               "q_stride", "blocks"])  # fmt: skip
def residual_stats(
    p_ints, p_floats, p_values, q_ints, q_floats, q_values, target_rows, draft_rows, masses,
    p_int_stride, p_float_stride, q_int_stride, q_float_stride, p_stride, q_stride, blocks,
    TILE: tl.constexpr,
    KIND: tl.constexpr, TERMS: tl.constexpr, LAWS: tl.constexpr, GENERAL: tl.constexpr, ADJUST: tl.constexpr,
    Q_KIND: tl.constexpr, Q_TERMS: tl.constexpr, Q_LAWS: tl.constexpr, Q_GENERAL: tl.constexpr,
):  # fmt: skip
    """Grid (requests, tiles). Residual mass of each block: `masses` float32 [requests, blocks]. `target_rows` and
    `draft_rows` int64 [requests]: where the request stopped, -1 if no draft of it was rejected."""
    request = tl.program_id(0).to(tl.int64)
    row, draft = tl.load(target_rows + request), tl.load(draft_rows + request)
    if row < 0:
        return
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    left = residual_tile(
        p_ints + row * p_int_stride, p_floats + row * p_float_stride, p_values,
        q_ints + draft * q_int_stride, q_floats + draft * q_float_stride, q_values,
        row, draft, block_offsets(block), p_stride, q_stride,
        KIND, TERMS, LAWS, GENERAL, ADJUST, Q_KIND, Q_TERMS, Q_LAWS, Q_GENERAL,
    )  # fmt: skip
    tl.store(masses + request * blocks + block, tl.sum(left, axis=1), mask=block < blocks)


@triton.jit(do_not_specialize=["p_int_stride", "p_float_stride", "q_int_stride", "q_float_stride", "p_stride",
                               "q_stride", "blocks"])  # fmt: skip
def residual_pick(
    p_ints, p_floats, p_values, q_ints, q_floats, q_values, target_rows, draft_rows, masses, tokens,
    p_int_stride, p_float_stride, q_int_stride, q_float_stride, p_stride, q_stride, blocks,
    BLOCKS: tl.constexpr,
    KIND: tl.constexpr, TERMS: tl.constexpr, LAWS: tl.constexpr, GENERAL: tl.constexpr, ADJUST: tl.constexpr,
    Q_KIND: tl.constexpr, Q_TERMS: tl.constexpr, Q_LAWS: tl.constexpr, Q_GENERAL: tl.constexpr,
):  # fmt: skip
    """Grid (requests). The token drawn from the residual, int64, or -1 where there is none: no draft was rejected, or
    rounding alone rejected one from the target's own law."""
    request = tl.program_id(0).to(tl.int64)
    row, draft = tl.load(target_rows + request), tl.load(draft_rows + request)
    tl.store(tokens + request, tl.full([], -1, tl.int64))
    if row < 0:
        return
    p_ints += row * p_int_stride
    p_floats += row * p_float_stride
    block = tl.arange(0, BLOCKS)
    mass = tl.load(masses + request * blocks + block, mask=block < blocks, other=0.0)
    if tl.sum(mass, axis=0) > 0.0:
        seed, position = tl.load(p_ints + SEED), tl.load(p_ints + POSITION).to(tl.int32)
        noisy = tl.log(mass) + gumbel(seed, position, STREAM_BLOCK, 0, BLOCKS)
        chosen = best_block(tl.where(mass > 0.0, noisy, float("-inf")), BLOCKS)
        offsets = chosen * TOKENS + tl.arange(0, TOKENS)
        left = residual_tile(
            p_ints, p_floats, p_values,
            q_ints + draft * q_int_stride, q_floats + draft * q_float_stride, q_values,
            row, draft, offsets[None, :], p_stride, q_stride,
            KIND, TERMS, LAWS, GENERAL, ADJUST, Q_KIND, Q_TERMS, Q_LAWS, Q_GENERAL,
        )  # fmt: skip
        left = tl.sum(left, axis=0)
        noisy = tl.log(left) + gumbel(seed, position, STREAM_TOKEN, chosen * TOKENS, TOKENS)
        token = best_of(tl.where(left > 0.0, noisy, float("-inf")), offsets)
        tl.store(tokens + request, token.to(tl.int64))
