"""Exact top-k, top-p and min-p, and the best n tokens, without sorting the vocabulary.

What a filter keeps is always "the best tokens in the order (score descending, id ascending), down to some last one",
so a filter only has to find that last token. It is looked for among the best tokens of the blocks with the highest
maxima; what lies in the other blocks is known to be no better than the next maximum. A row whose last token is not
found there for certain is searched by bisection. Nothing is approximate.

Scores are float32 [n, V], V a multiple of 256, after temperature; `top_k` int64 [n] (0 = off), `top_p` float32 [n]
(1 = off), `min_p` float32 [n] (0 = off).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from proxyserve_kernels.rows import BLOCK
from proxyserve_kernels.torch_backend.blocks import in_blocks, log_partition, row_sum

#: (blocks opened, best tokens looked at) of each attempt before the bisection.
ATTEMPTS = ((32, 256), (256, 4096))


class Last(NamedTuple):
    """The last kept token of each row: float32 [n], int64 [n]."""

    score: Tensor
    id: Tensor


def keeps(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens the filters keep, bool [n, V]. The parameters may lie on the host."""
    device = scores.device
    last = cut(scores, top_k.to(device), top_p.to(device), min_p.to(device))
    return before(scores, last) | (scores == last.score[:, None]) & (_ids(scores) == last.id[:, None])


def before(scores: Tensor, token: Last) -> Tensor:
    """Tokens that come before `token` in the order (score descending, id ascending), bool [n, V]."""
    return (scores > token.score[:, None]) | (scores == token.score[:, None]) & (
        _ids(scores) < token.id[:, None]
    )


def _ids(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device)


def cut(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Last:
    """The last token that min-p, then top-k, then top-p on what is left keep."""
    total = log_partition(scores)
    score = torch.empty_like(total)
    token = torch.empty_like(total, dtype=torch.int64)
    todo = torch.arange(scores.shape[0], device=scores.device)
    for blocks, candidates in ATTEMPTS:
        best = _best(scores[todo], blocks, candidates)
        last, certain = _last_kept(best, total[todo], top_k[todo], top_p[todo], min_p[todo])
        done = todo[certain]
        score[done], token[done] = _at(best.scores, last)[certain], _at(best.ids, last)[certain]
        todo = todo[~certain]
        if not todo.numel():
            return Last(score, token)
    found = _search(scores[todo], top_k[todo], top_p[todo], min_p[todo])
    score[todo], token[todo] = found
    return Last(score, token)


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best `count` (at most V) tokens in order: scores float32 [n, count], ids int64 [n, count]."""
    best = _best(scores, count + 1, 2 * count + 8)
    enough = best.scores.shape[1] == scores.shape[1]
    if not (enough or bool((best.scores[:, count - 1] > best.bound).all())):
        n = scores.shape[0]
        off = torch.zeros(n, device=scores.device)
        last = cut(scores, torch.full((n,), count, device=scores.device), off + 1, off)
        kept = before(scores, last) | (_ids(scores) == last.id[:, None])
        # The kept ones are exactly the best `count`, unless the row is bad.
        values, ids = _in_order(*scores.masked_fill(~kept, -math.inf).topk(count, dim=1))
        return values, ids
    return best.scores[:, :count], best.ids[:, :count]


class _Best(NamedTuple):
    """The best C tokens of each row in order; every token not among them has a score of at most `bound` [n]."""

    scores: Tensor
    ids: Tensor
    bound: Tensor


def _best(scores: Tensor, blocks: int, candidates: int) -> _Best:
    opened = in_blocks(scores)
    bound = torch.full_like(scores[:, 0], -math.inf)
    ids = None
    if 2 * blocks < opened.shape[1]:  # else looking at everything costs no more
        maxima, order = opened.amax(dim=-1).topk(blocks + 1, dim=1)
        bound, order = maxima[:, -1], order[:, :-1]
        opened = opened.gather(1, order[..., None].expand(-1, -1, BLOCK))
        ids = order * BLOCK
    flat = opened.flatten(1)
    count = min(candidates, flat.shape[1])
    values, places = flat.topk(count, dim=1)
    if ids is not None:
        places = ids.gather(1, places // BLOCK) + places % BLOCK
    if count < flat.shape[1]:
        bound = torch.maximum(bound, values[:, -1])
    return _Best(*_in_order(values, places), bound)


def _in_order(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sort candidates by score, ties by lowest id (topk leaves the order of ties open)."""
    ids, by_id = ids.sort(dim=1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _at(table: Tensor, column: Tensor) -> Tensor:
    return table.gather(1, column[:, None])[:, 0]


def _last_kept(
    best: _Best, total: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Rank of the last kept token per row, and whether the candidates were enough to know it. `total` is the row's
    log-partition."""
    values = best.scores
    ranks = torch.arange(values.shape[1], device=values.device)
    floor = values[:, 0] + torch.log(min_p)  # -inf where min-p is off
    survives = values >= floor[:, None]
    survives &= (top_k[:, None] == 0) | (ranks < top_k[:, None])
    survivors = survives.sum(dim=1)  # the survivors are a beginning of the list
    mass = torch.where(survives, values - total[:, None], -math.inf).double().exp().cumsum(dim=1)
    unlimited = (top_k == 0) & (min_p == 0)
    everything = torch.isneginf(best.bound)
    whole = torch.where(unlimited & ~everything, 1.0, mass[:, -1])
    earlier = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=1)
    kept = survives & ((earlier < (top_p.double() * whole)[:, None]) | (top_p[:, None] >= 1.0))
    last = kept.sum(dim=1).clamp(min=1) - 1
    # Known for sure if the survivors' mass is known, and the last kept score is above everything that was not looked
    # at (a token with the same score but a lower id might be there).
    reached = unlimited | (survivors < values.shape[1]) | ((top_k > 0) & (survivors == top_k))
    return last, everything | (reached & (_at(values, last) > best.bound))


def _search(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Last:
    """The last kept token by bisection over the 2**32 possible scores, for rows that keep very many."""
    scores = scores + 0.0  # -0.0 and 0.0 are equal but have different bits
    floor = scores.amax(dim=1) + torch.log(min_p)
    alive = (scores >= floor[:, None]).double()
    count = torch.where(top_k == 0, scores.shape[1], top_k).double()
    by_count = _reach(scores, alive, torch.minimum(count, row_sum(alive)))
    alive *= before(scores, by_count) | (_ids(scores) == by_count.id[:, None])
    mass = (scores - scores.amax(dim=1, keepdim=True)).double().exp() * alive
    # A top-p of 1 must not lose tokens whose mass is lost in the sum.
    by_mass = _reach(scores, mass, row_sum(mass) * top_p.double())
    off = top_p >= 1.0
    return Last(torch.where(off, by_count.score, by_mass.score), torch.where(off, by_count.id, by_mass.id))


def _reach(scores: Tensor, weight: Tensor, target: Tensor) -> Last:
    """The first token, in the order (score descending, id ascending), up to which `weight` float64 [n, V] sums to
    `target` float64 [n]."""
    bits = scores.view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # ordered as the scores are
    low, high = keys.amin(dim=1), keys.amax(dim=1)  # the key sought is in low .. high
    while bool((low < high).any()):
        middle = (low + high + 1) >> 1
        enough = row_sum(weight * (keys >= middle[:, None])) >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    above = row_sum(weight * (keys > low[:, None]))
    tied = keys == low[:, None]
    # Tied tokens have one score, so one weight, except those already filtered out, which have none.
    level = (tied * weight).cumsum(dim=1) + above[:, None]
    reached = tied & (level >= target[:, None]) & (weight > 0)
    first = reached.int().argmax(dim=1)
    final = (
        (tied & (weight > 0)).int().cumsum(dim=1).argmax(dim=1)
    )  # rounding may leave the target just out of reach
    token = torch.where(reached.any(dim=1), first, final)
    return Last(_at(scores, token), token)
