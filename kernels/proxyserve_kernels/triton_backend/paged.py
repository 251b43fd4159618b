"""Attention of single tokens over paged keys and values: the launches. Nothing is read back, and shapes decide
everything, so that it can be captured in a graph."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from proxyserve_kernels.triton_backend.device import paged

#: Keys that a program reads at once.
KEYS = 64
WARPS = 4
#: As many programs as keep a large GPU busy; with fewer tokens and heads, a token's keys are shared out.
PROGRAMS = 512
MOST_SHARES = 32
#: The fewest rows of a product on tensor cores.
_LEAST_ROWS = 16


def shares_for(tokens: int, kv_heads: int) -> int:
    """How many programs share the keys of one token and key head: a power of two."""
    wanted = max(1, PROGRAMS // (tokens * kv_heads))
    return min(MOST_SHARES, 1 << (wanted.bit_length() - 1))


def attend_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    firsts: Tensor,
    positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Each token over the keys of its lane up to its own position -> [tokens, heads, value size] in the query's dtype.

    `query` [tokens, heads, size], contiguous; `keys` [blocks, block size, kv heads, size] and `values` [.., value
    size], contiguous, of the same dtype; `pages` int64: block ids of lanes, those of a token's lane from place `firsts`
    [tokens] int64 on, in order of position; `positions` [tokens] int64. `softcap`: scores become cap * tanh(score /
    cap). `window`: a token sees itself and `window - 1` before it. `sinks` [heads]: scores with no value. Raises
    ValueError for tensors that are not contiguous."""
    if not (query.is_contiguous() and keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("query, keys and values must be contiguous")
    tokens, heads, size = query.shape
    block_size, kv_heads, value = values.shape[1:]
    shares = shares_for(tokens, kv_heads)
    partial = query.new_empty((tokens, heads, shares, value), dtype=torch.float32)
    maxima = query.new_empty((tokens, heads, shares), dtype=torch.float32)
    sums = torch.empty_like(maxima)
    value_width = triton.next_power_of_2(max(value, _LEAST_ROWS))
    paged.attend_share[(tokens, kv_heads, shares)](
        query, keys, values, pages, firsts, positions, partial, maxima, sums,
        scale, softcap or 1.0, window or 0,
        BLOCK_SIZE=block_size, HEADS=heads, KV_HEADS=kv_heads, SIZE=size, VALUE=value,
        GROUP=triton.next_power_of_2(max(heads // kv_heads, _LEAST_ROWS)),
        WIDTH=triton.next_power_of_2(max(size, _LEAST_ROWS)), VALUE_WIDTH=value_width,
        KEYS=KEYS, SHARES=shares, SOFTCAP=softcap is not None, WINDOW=window is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=WARPS,
    )  # fmt: skip
    out = query.new_empty((tokens, heads, value))
    paged.join_shares[(tokens, heads)](
        partial, maxima, sums, out if sinks is None else sinks, out,
        HEADS=heads, VALUE=value, VALUE_WIDTH=value_width, SHARES=shares, SINKS=sinks is not None, num_warps=1,
    )  # fmt: skip
    return out
