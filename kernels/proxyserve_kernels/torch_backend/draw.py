"""Exact sampling by hierarchical Gumbel noise: first a block of tokens, then a token inside it.

A softmax draw is the argmax of score + Gumbel noise. Doing it over blocks first (whose score is the log of their
mass) and over the tokens of the winning block second gives the same law with about V/256 + 256 random numbers
instead of V. Compared with inverse-CDF sampling, a seed keeps its token far more often when the scores change
slightly."""

from __future__ import annotations

import torch
from torch import Tensor

from proxyserve_kernels.philox import STREAM_BLOCK, STREAM_TOKEN, gumbel
from proxyserve_kernels.rows import BLOCK
from proxyserve_kernels.torch_backend.blocks import block_log_mass, in_blocks


def draw(
    scores: Tensor, seeds: Tensor, positions: Tensor, streams: tuple[int, int] = (STREAM_BLOCK, STREAM_TOKEN)
) -> Tensor:
    """One token per row from softmax(scores). [n, V] float32, V a multiple of 256; int64 [n] each -> int64 [n].

    The noise depends on (seed, position, block or token id) only. Tokens at -inf are never drawn from a row that
    has any other; the caller handles rows that have none."""
    mass = block_log_mass(scores)
    zero = torch.zeros_like(seeds)
    block = (mass + gumbel(seeds, positions, streams[0], zero, mass.shape[1])).argmax(dim=1)
    inside = in_blocks(scores)[torch.arange(scores.shape[0], device=scores.device), block]
    noise = gumbel(seeds, positions, streams[1], block * BLOCK, BLOCK)
    return block * BLOCK + (inside + noise).argmax(dim=1)
