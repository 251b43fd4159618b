"""Exact top-k, top-p and min-p, and the best n tokens, without sorting the vocabulary.

What a filter keeps is always "the best tokens in the order (score descending, id ascending), down to some last one",
so a filter only has to find that last token. It is looked for among the best tokens of the blocks with the highest
maxima; what lies in the other blocks is known to be no better than the next maximum. A row whose last token is not
found there for certain is divided into bins by score, and only the bin that holds the last token is sorted. Nothing is
approximate. A token at -inf is never kept.

Scores are float32 [n, V], V a multiple of 256, after temperature; `top_k` int64 [n] (0 = off), `top_p` float32 [n]
(1 = off), `min_p` float32 [n] (0 = off).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from proxyserve_kernels.rows import BLOCK
from proxyserve_kernels.torch_backend.blocks import in_blocks, log_partition

#: Blocks opened, and best tokens of them looked at, before a row is divided into bins.
OPENED, CANDIDATES = 64, 256

#: Bins, and their width in nats; the last one holds everything below.
BINS, BIN_WIDTH = 4096, 0.01


class Last(NamedTuple):
    """The last kept token of each row: float32 [n], int64 [n]."""

    score: Tensor
    id: Tensor


def filtered(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """A copy of the scores with -inf for what the filters remove: min-p, then top-k, then top-p on what is left. The
    parameters may lie on the host. A bad row (NaN, +inf, nothing possible) gives anything."""
    device = scores.device
    top_k, top_p, min_p = top_k.to(device), top_p.to(device), min_p.to(device)
    total = log_partition(scores)
    if bool(_in_vain(scores, total, top_k, top_p, min_p).all()):
        kept = torch.empty_like(scores)
        uncertain = list(range(scores.shape[0]))
    else:
        best = _best(scores, OPENED, CANDIDATES)
        last, certain = _last_kept(best, total, top_k, top_p, min_p)
        ranks = torch.arange(best.scores.shape[1], device=device)
        listed = torch.where(ranks <= last[:, None], best.scores, -math.inf)
        kept = torch.full_like(scores, -math.inf).scatter_(1, best.ids, listed)
        uncertain = (~certain).nonzero()[:, 0].tolist()
    for row in uncertain:
        kept[row] = _search(scores[row], int(top_k[row]), float(top_p[row]), float(min_p[row])).of(
            scores[row]
        )
    return kept


def _in_vain(scores: Tensor, total: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Rows in which even `CANDIDATES` tokens as likely as the likeliest would not hold `top_p`, bool [n]: looking at
    the best tokens cannot settle these."""
    most = in_blocks(scores).amax(dim=-1).amax(dim=1) - total + math.log(CANDIDATES)
    return (top_k == 0) & (min_p == 0) & (top_p < 1.0) & (most < top_p.log())


def before(scores: Tensor, token: Last) -> Tensor:
    """Tokens that come before `token` in the order (score descending, id ascending), bool [n, V]."""
    return (scores > token.score[:, None]) | (scores == token.score[:, None]) & (
        _ids(scores) < token.id[:, None]
    )


def _ids(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device)


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best `count` (at most V) tokens in order: scores float32 [n, count], ids int64 [n, count]."""
    best = _best(scores, count + 1, 2 * count + 8)
    values, ids = best.scores[:, :count].clone(), best.ids[:, :count].clone()
    unsure = values[:, -1] <= best.bound
    for row in unsure.nonzero()[:, 0].tolist():
        if not math.isinf(float(best.bound[row])):  # else what is missing is impossible anyway
            inside = _search(scores[row], count, 1.0, 0.0).of(scores[row])
            # Exactly `count` tokens, unless the row is bad.
            chosen = inside[None].topk(count, dim=1)
            values[row : row + 1], ids[row : row + 1] = _in_order(*chosen)
    return values, ids


class _Best(NamedTuple):
    """The best C tokens of each row in order; every token not among them has a score of at most `bound` [n]."""

    scores: Tensor
    ids: Tensor
    bound: Tensor


def _best(scores: Tensor, blocks: int, candidates: int) -> _Best:
    opened = in_blocks(scores)
    bound = torch.full_like(scores[:, 0], -math.inf)
    ids = None
    if blocks < opened.shape[1]:
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


class _Kept(NamedTuple):
    """Tokens of one row: those of a score above `level`, and those with the ids `beside` int64 [m]."""

    level: float
    beside: Tensor

    def of(self, scores: Tensor) -> Tensor:
        """A copy of the row [V] with -inf for all others."""
        kept = torch.threshold(scores, self.level, -math.inf)
        kept[self.beside] = scores[self.beside]
        return kept


def _search(scores: Tensor, top_k: int, top_p: float, min_p: float) -> _Kept:
    """What the filters keep of one row [V], which may be very many tokens."""
    peak = scores.max()
    if not bool(torch.isfinite(peak)):  # a bad row
        return _Kept(-math.inf, torch.zeros(0, dtype=torch.int64, device=scores.device))
    # Rounding keeps the order: a better score never has a later bin.
    bins = (peak - scores).mul_(1 / BIN_WIDTH).clamp_(max=BINS - 1).int()
    alive = scores > -math.inf
    if min_p:
        alive &= scores >= peak + math.log(min_p)
    if top_k:
        living = alive.double()
        sums = torch.bincount(bins, weights=living, minlength=BINS)
        alive &= _reach(scores, alive, bins, sums, living, float(top_k)).of(scores) > -math.inf
    mass = torch.where(alive, (scores - peak).exp_(), 0.0).double()
    sums = torch.bincount(bins, weights=mass, minlength=BINS)
    # A top-p of 1 must not lose tokens whose mass is lost in the sum.
    goal = math.inf if top_p >= 1.0 else top_p * float(sums.sum())
    return _reach(scores, alive, bins, sums, mass, goal)


def _reach(scores: Tensor, alive: Tensor, bins: Tensor, sums: Tensor, weight: Tensor, goal: float) -> _Kept:
    """The tokens, best first, with which `weight` float64 [V] of the living reaches `goal`, or all living ones; some
    token lives, and no other is better than one that does. `sums` float64 [BINS] are the weights of the bins."""
    level = sums.cumsum(dim=0)
    full = int((level < goal).sum())  # so many bins lie before the one where the goal is reached
    if full >= BINS:
        full = int(bins[alive].max())
    members = (alive & (bins == full)).nonzero()[:, 0]
    members = members[scores[members].sort(descending=True, stable=True).indices]
    earlier = level[full] - sums[full]
    reached = earlier + weight[members].cumsum(dim=0) >= goal
    place = int((~reached).sum()) if bool(reached[-1]) else members.shape[0] - 1
    # Whatever is better than the best of its bin is in an earlier bin.
    return _Kept(float(scores[members[0]]), members[: place + 1])
