"""Reductions over the vocabulary in blocks of 256.

torch splits a long reduction among threads when there is only one row of it, and then adds in another order than it
does for many rows. Reducing within blocks first, then over the few block results, keeps one order for every batch.
All functions take float32 [n, V], V a multiple of 256.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proxyserve_kernels.rows import BLOCK


def in_blocks(scores: Tensor) -> Tensor:
    """[n, V] -> [n, V / 256, 256], a view."""
    return scores.unflatten(1, (-1, BLOCK))


def row_sum(values: Tensor) -> Tensor:
    """[n, V] -> [n]."""
    return in_blocks(values).sum(dim=-1).sum(dim=-1)


def block_log_mass(scores: Tensor) -> Tensor:
    """Log of the sum of exp(score) of each block: [n, V] -> [n, V / 256], -inf where a block is empty."""
    return torch.logsumexp(in_blocks(scores), dim=-1)


def log_partition(scores: Tensor) -> Tensor:
    """Log of the sum of exp(score) of each row: [n, V] -> [n]."""
    return torch.logsumexp(block_log_mass(scores), dim=-1)
