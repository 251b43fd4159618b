"""Exact top-k, top-p and min-p without sorting the vocabulary.

The kept set of a row is always "the best tokens in the order (score descending, id ascending), down to some last
one". So a filter only has to find that last token. Nearly always it is among the best 256, which are cheap to find;
a row where it is not is sorted in full. Nothing is approximate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: How many of the best tokens are looked at before a row is sorted.
CANDIDATES = 256


def apply_filters(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """Set to -inf, in place, what the filters remove. `scores` float32 [n, V] after temperature; `top_k` int64 [n]
    (0 = off), `top_p` float32 [n] (1 = off), `min_p` float32 [n] (0 = off).

    min-p keeps tokens at least `min_p` times as likely as the best one; top-k then keeps the best k of them; top-p
    then keeps the smallest best-first set that holds at least `top_p` of what is left. Ties go to the lowest id.
    """
    count = min(CANDIDATES, scores.shape[1])
    values, ids = _in_order(*scores.topk(count, dim=1))
    log_total = torch.logsumexp(scores, dim=1)
    last, certain = _last_kept(values, log_total, top_k, top_p, min_p, complete=count == scores.shape[1])
    last_value, last_id = _at(values, last), _at(ids, last)
    unsure = (~certain).nonzero()[:, 0]
    if unsure.numel():
        all_values, all_ids = scores[unsure].sort(dim=1, descending=True, stable=True)
        last, _ = _last_kept(
            all_values, log_total[unsure], top_k[unsure], top_p[unsure], min_p[unsure], complete=True
        )
        last_value[unsure], last_id[unsure] = _at(all_values, last), _at(all_ids, last)
    token_ids = torch.arange(scores.shape[1], device=scores.device)
    removed = scores < last_value[:, None]
    removed |= (scores == last_value[:, None]) & (token_ids > last_id[:, None])
    scores.masked_fill_(removed, -math.inf)


def _in_order(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sort candidates by score, ties by lowest id (topk leaves the order of ties open)."""
    ids, by_id = ids.sort(dim=1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _at(table: Tensor, column: Tensor) -> Tensor:
    return table.gather(1, column[:, None])[:, 0]


def _last_kept(
    values: Tensor, log_total: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, complete: bool
) -> tuple[Tensor, Tensor]:
    """Rank of the last kept token per row, and whether the candidates were enough to know it.

    `values` [n, C] are the best C scores in order; `complete` says that they are all there are.
    """
    ranks = torch.arange(values.shape[1], device=values.device)
    floor = values[:, 0] + torch.log(min_p)  # -inf where min-p is off
    survives = values >= floor[:, None]
    survives &= (top_k[:, None] == 0) | (ranks < top_k[:, None])
    survivors = survives.sum(dim=1)  # the survivors are a beginning of the list
    mass = torch.where(survives, values - log_total[:, None], -math.inf).double().exp().cumsum(dim=1)
    reaches_end = survivors == values.shape[1]
    unlimited = (top_k == 0) & (min_p == 0)
    total = torch.where(unlimited, 1.0, mass[:, -1])
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=1)
    kept = survives & ((before < (top_p.double() * total)[:, None]) | (top_p[:, None] >= 1.0))
    last = kept.sum(dim=1).clamp(min=1) - 1
    if complete:
        return last, torch.ones_like(reaches_end)
    # Known for sure if the survivors' mass is known, and the last kept score is above the worst candidate's (else
    # tokens with the same score, perhaps with lower ids, may lie outside the candidates).
    certain = (unlimited | ~reaches_end) & (_at(values, last) > values[:, -1])
    return last, certain
