"""What one would write with torch alone. `weight` 1, one pair of experts; logits [B, V] of any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def fused(base: Tensor, tuned: Tensor, untuned: Tensor) -> Tensor:
    """Fused scores, float32 [B, V]."""
    return base.float() + (tuned.float() - untuned.float())


def sample(base: Tensor, tuned: Tensor, untuned: Tensor, temperature: float) -> Tensor:
    """No filters: softmax over everything, multinomial."""
    return torch.multinomial(torch.softmax(fused(base, tuned, untuned) / temperature, dim=-1), 1)[:, 0]


def sample_sorted(
    base: Tensor, tuned: Tensor, untuned: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Top-k and top-p as usual: sort the vocabulary, cumulate, mask, draw among the sorted, map back."""
    ids, law = sorted_law(fused(base, tuned, untuned) / temperature, top_k, top_p)
    return ids.gather(1, torch.multinomial(law, 1))[:, 0]


def sorted_law(scores: Tensor, top_k: int, top_p: float, *, stable: bool = False) -> tuple[Tensor, Tensor]:
    """Ids, best first, int64 [B, V], and their probabilities before the last renormalisation, 0 where filtered. Ties
    are in any order, or by id if `stable`."""
    values, ids = scores.sort(dim=-1, descending=True, stable=stable)
    if top_k:
        values[:, top_k:] = -torch.inf
    law = torch.softmax(values, dim=-1)
    if top_p < 1.0:
        law[law.cumsum(dim=-1) - law >= top_p] = 0.0
    return ids, law


def greedy(base: Tensor, tuned: Tensor, untuned: Tensor) -> Tensor:
    """The best token."""
    return fused(base, tuned, untuned).argmax(dim=-1)


def greedy_logprobs(base: Tensor, tuned: Tensor, untuned: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best token and the log-probs of the `count` likeliest."""
    law = torch.log_softmax(fused(base, tuned, untuned), dim=-1)
    return law.argmax(dim=-1), law.topk(count, dim=-1).values
