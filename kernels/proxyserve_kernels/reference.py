"""The slow, obvious twin: one row at a time, float64, everything sorted. Tests compare the fast code with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from proxyserve_kernels.philox import STREAM_BLOCK, STREAM_TOKEN, gumbel
from proxyserve_kernels.rows import BLOCK


def fused_log_probs(base: Tensor, terms: Sequence[tuple[float, Tensor, Tensor]], width: int) -> Tensor:
    """Log-probs [width] float64 of `l_base + sum w (l_positive - l_negative)`, l the log-softmax over `width`."""
    scores = torch.log_softmax(base[:width].double(), dim=0)
    for weight, positive, negative in terms:
        delta = torch.log_softmax(positive[:width].double(), dim=0) - torch.log_softmax(
            negative[:width].double(), dim=0
        )
        scores = scores + weight * delta
    return torch.log_softmax(scores, dim=0)


def kept_ids(scores: Tensor, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Ids that min-p, then top-k, then top-p leave of `scores` [V] (after temperature), best first, ties by id."""
    law = torch.softmax(scores.double(), dim=0)
    order = sorted(range(len(law)), key=lambda token: (-scores[token].item(), token))
    kept = [token for token in order if law[token] >= min_p * law.max()]
    if top_k:
        kept = kept[:top_k]
    if top_p >= 1.0:
        return kept
    total, mass = float(law[kept].sum()), 0.0
    nucleus: list[int] = []
    for token in kept:
        if nucleus and mass >= top_p * total:
            break
        nucleus.append(token)
        mass += float(law[token])
    return nucleus


def draw_one(scores: Tensor, seed: int, position: int) -> int:
    """The hierarchical draw of `draw.draw` from `scores` [V], spelled out for one row."""
    seeds, positions = torch.tensor([seed]), torch.tensor([position])
    blocks = -(-len(scores) // BLOCK)
    noise = gumbel(seeds, positions, STREAM_BLOCK, torch.tensor([0]), blocks)[0].double()
    masses = [torch.logsumexp(scores[b * BLOCK : (b + 1) * BLOCK].double(), dim=0) for b in range(blocks)]
    block = max(range(blocks), key=lambda b: float(masses[b] + noise[b]))
    inside = scores[block * BLOCK : (block + 1) * BLOCK].double()
    noise = gumbel(seeds, positions, STREAM_TOKEN, torch.tensor([block * BLOCK]), BLOCK)[0].double()
    return block * BLOCK + int((inside + noise[: len(inside)]).argmax())
