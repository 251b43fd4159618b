"""Attention of single tokens over paged keys and values.

Each program has one token, one key head with the query heads that share it, and a share of the token's keys; a second
kernel puts the shares together. Tokens of one lane (drafts being verified) read the same blocks at about the same time,
which the L2 cache serves.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_share(
    query,
    keys,
    values,
    pages,
    firsts,
    positions,
    partial,
    maxima,
    sums,
    scale,
    softcap,
    window,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    SHARES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`query` [tokens, HEADS, SIZE]; `keys` [blocks, BLOCK_SIZE, KV_HEADS, SIZE] and `values` likewise; the blocks of a
    token's lane begin at `firsts` [tokens] int64 in `pages` int64; `positions` [tokens] int64. Writes, float32, the
    unnormalised sums of values `partial` [tokens, HEADS, SHARES, VALUE], and of each share the largest score and the
    sum of exponentials [tokens, HEADS, SHARES]. GROUP, WIDTH and VALUE_WIDTH are heads per key head (at least 16, for
    the tensor cores), SIZE and VALUE rounded up to powers of two."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    share = tl.program_id(2)
    length = tl.load(positions + token) + 1
    first = tl.load(firsts + token)
    begin = length * 0
    if WINDOW:
        begin = tl.maximum(length - window, 0)
    each = tl.cdiv(tl.cdiv(length - begin, SHARES), KEYS) * KEYS
    low = begin + share * each
    high = tl.minimum(low + each, length)

    together: tl.constexpr = HEADS // KV_HEADS
    rows = tl.arange(0, GROUP)
    heads = kv_head * together + rows
    dims, value_dims = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    mine = rows < together
    q = tl.load(
        query + (token * HEADS + heads[:, None]) * SIZE + dims[None, :],
        mask=mine[:, None] & (dims < SIZE)[None, :],
        other=0.0,
    )
    top = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    summed = tl.zeros([GROUP, VALUE_WIDTH], tl.float32)
    start = low
    while start < high:
        places = start + tl.arange(0, KEYS)
        known = places < high
        page = tl.load(pages + first + places // BLOCK_SIZE, mask=known, other=0)
        slots = page * BLOCK_SIZE + places % BLOCK_SIZE
        k = tl.load(
            keys + (slots[:, None] * KV_HEADS + kv_head) * SIZE + dims[None, :],
            mask=known[:, None] & (dims < SIZE)[None, :],
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(known[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp(
            top - higher
        )  # the first time exp(-inf) = 0: `high` is above `start`, so `higher` is finite
        weights = tl.exp(scores - higher[:, None])
        v = tl.load(
            values + (slots[:, None] * KV_HEADS + kv_head) * VALUE + value_dims[None, :],
            mask=known[:, None] & (value_dims < VALUE)[None, :],
            other=0.0,
        )
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, axis=1)
        top = higher
        start += KEYS
    at = (token * HEADS + heads) * SHARES + share
    tl.store(maxima + at, top, mask=mine)
    tl.store(sums + at, total, mask=mine)
    tl.store(
        partial + at[:, None] * VALUE + value_dims[None, :],
        summed,
        mask=mine[:, None] & (value_dims < VALUE)[None, :],
    )


@triton.jit
def join_shares(
    partial,
    maxima,
    sums,
    sinks,
    out,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SHARES: tl.constexpr,
    SINKS: tl.constexpr,
):
    """`out` [tokens, HEADS, VALUE] from the shares. `sinks` [HEADS] are further scores whose value is 0."""
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    shares, dims = tl.arange(0, SHARES), tl.arange(0, VALUE_WIDTH)
    tops = tl.load(maxima + row * SHARES + shares)
    top = tl.max(tops, axis=0)  # finite: a token attends at least to itself
    if SINKS:
        sink = tl.load(sinks + tl.program_id(1)).to(tl.float32)
        top = tl.maximum(top, sink)
    weights = tl.exp(tops - top)
    total = tl.sum(tl.load(sums + row * SHARES + shares) * weights, axis=0)
    if SINKS:
        total += tl.exp(sink - top)
    parts = tl.load(
        partial + (row * SHARES + shares)[:, None] * VALUE + dims[None, :],
        mask=(dims < VALUE)[None, :],
        other=0.0,
    )
    result = tl.sum(parts * weights[:, None], axis=0) / total
    tl.store(out + row * VALUE + dims, result.to(out.dtype.element_ty), mask=dims < VALUE)
