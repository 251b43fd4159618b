"""Fuse a mixed batch, adjust, filter, draw, and say how likely the tokens were."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from proxyserve_kernels.controls import MIN_TEMPERATURE, Logprobs, PickControls, Picks
from proxyserve_kernels.rows import RowBatch
from proxyserve_kernels.torch_backend.adjust import adjust, removed
from proxyserve_kernels.torch_backend.blocks import best_of, exp_, log_partition, row_sum
from proxyserve_kernels.torch_backend.draw import draw
from proxyserve_kernels.torch_backend.filters import Last, before, filtered, top
from proxyserve_kernels.torch_backend.parts import PART, in_parts, joined
from proxyserve_kernels.torch_backend.scores import Fused, fuse


def pick(batch: RowBatch, controls: PickControls) -> Picks:
    """See `Backend.pick`."""
    if batch.device.type == "cpu" and batch.size > PART:
        return joined([pick_at_once(*part) for part in in_parts(batch, controls)])
    return pick_at_once(batch, controls)


def pick_at_once(batch: RowBatch, controls: PickControls) -> Picks:
    """`pick` of all rows together."""
    fused = fuse(batch, compare=controls.compare)
    kl, flips = _compare(fused)
    asked = wanted(controls.raw)
    unadjusted = fused.scores[asked.to(batch.device)] if asked.numel() else None
    scores = fused.scores
    lost = None
    if controls.adjustments is not None:
        lost = removed(scores, controls.adjustments)
        adjust(scores, controls.adjustments)
    peak, best = best_of(scores)
    valid = torch.isfinite(peak)  # a NaN counts as the largest
    told = wanted(controls.processed)
    tokens, processed_scores = _choose(scores, best, controls, told)
    tokens = torch.where(valid, tokens, -1)
    subject = tokens
    if controls.forced is not None:
        forced = controls.forced.to(batch.device)
        subject = torch.where(forced >= 0, forced, tokens)
    raw = processed = None
    if unadjusted is not None:
        raw = logprobs(unadjusted, asked, subject, most(controls.raw), controls.listed)
    if processed_scores is not None:
        processed = logprobs(processed_scores, told, subject, most(controls.processed))
    return Picks(tokens, valid, kl, flips, raw, processed, lost)


def processed(batch: RowBatch, controls: PickControls, rows: Tensor) -> Tensor:
    """Log-probs of the processed laws of `rows` int64 [n] (host), float32 [n, V]."""
    scores = fuse(batch, compare=False).scores
    if controls.adjustments is not None:
        adjust(scores, controls.adjustments)
    at = rows.to(scores.device)
    law = _law(scores[at], best_of(scores[at])[1], controls, rows)
    return law - log_partition(law)[:, None]


def _law(scores: Tensor, best: Tensor, controls: PickControls, rows: Tensor) -> Tensor:
    """Scores whose softmax is the processed law, float32 [n, V]. `scores` [n, V] and `best` [n] belong to `rows`; the
    scores are overwritten."""
    device = scores.device
    sampled = controls.temperature[rows] >= MIN_TEMPERATURE
    greedy = ~sampled.to(device)
    scale = 1.0 / torch.where(sampled, controls.temperature[rows], 1.0)
    law = scores.mul_(scale.to(device)[:, None])
    top_k, top_p, min_p = controls.top_k[rows], controls.top_p[rows], controls.min_p[rows]
    filters = ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)) & sampled
    chosen = filters.nonzero()[:, 0]
    if chosen.numel() == rows.numel():
        law = filtered(law, top_k, top_p, min_p)
    elif chosen.numel():
        at = chosen.to(device)
        law[at] = filtered(law[at], top_k[chosen], top_p[chosen], min_p[chosen])
    if bool(greedy.any()):
        ids = torch.arange(law.shape[1], device=device)
        law = torch.where(greedy[:, None], torch.where(ids == best[:, None], 0.0, -math.inf), law)
    return law


def _choose(
    scores: Tensor, best: Tensor, controls: PickControls, told: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Tokens int64 [B], and the processed scores of the rows `told`. Greedy rows take `best`, the others are drawn.
    The scores may be overwritten."""
    needed = controls.temperature >= MIN_TEMPERATURE
    needed[told] = True
    rows = needed.nonzero()[:, 0]
    if not rows.numel():
        return best, None
    device = scores.device
    at = rows.to(device)
    law = _law(_rows(scores, at), best[at], controls, rows)
    sampled = (controls.temperature[rows] >= MIN_TEMPERATURE).nonzero()[:, 0]
    tokens = best.clone()
    if sampled.numel():
        own = rows[sampled]
        seeds, positions = controls.seeds[own].to(device), controls.positions[own].to(device)
        tokens[own.to(device)] = draw(_rows(law, sampled.to(device)), seeds, positions)
    if not told.numel():
        return tokens, None
    return tokens, law[torch.searchsorted(rows, told).to(device)]


def _rows(scores: Tensor, rows: Tensor) -> Tensor:
    """`rows` int64 [m], in order, of [n, V]; not a copy where that is all of them."""
    return scores if rows.numel() == scores.shape[0] else scores[rows]


def _compare(fused: Fused) -> tuple[Tensor, Tensor]:
    """KL(fused || reference) and flips: 0 and False for rows that are their reference."""
    kl = torch.zeros(fused.scores.shape[0], dtype=torch.float32, device=fused.scores.device)
    flips = torch.zeros_like(kl, dtype=torch.bool)
    if not fused.changed.numel():
        return kl, flips
    rows = fused.changed.to(kl.device)
    scores = fused.scores if rows.shape[0] == kl.shape[0] else fused.scores[rows]
    reference = fused.reference
    peak, best = best_of(scores)
    other_peak, other_best = best_of(reference)
    # KL = E_fused[fused - reference] - log Z_fused + log Z_reference, with every exp taken once.
    p = exp_(scores - peak[:, None])
    mass = row_sum(p)
    # A token without mass adds nothing: neither an infinite gap nor one of two infinities.
    gap = (scores - reference).nan_to_num_(nan=0.0, posinf=math.inf, neginf=0.0)
    total = row_sum(gap.mul_(p))
    if bool(total.isnan().any()):  # a broken row, or mass that rounded to 0 where the reference has none
        total = row_sum((scores - reference).masked_fill_(p == 0, 0.0).mul_(p))
    moved = total / mass
    other_mass = row_sum(exp_(reference - other_peak[:, None]))
    # Rounding may leave a KL of nearly nothing below zero.
    kl[rows] = (moved - peak - mass.log() + other_peak + other_mass.log()).clamp_(min=0.0)
    flips[rows] = best != other_best
    return kl, flips


def wanted(wishes: Sequence[int | None] | None) -> Tensor:
    """Rows that asked, int64 [m] on the host."""
    rows = [row for row, wish in enumerate(wishes or ()) if wish is not None]
    return torch.tensor(rows, dtype=torch.int64)


def most(wishes: Sequence[int | None] | None) -> int:
    """The longest list that was asked for."""
    return max((wish for wish in wishes or () if wish is not None), default=0)


def logprobs(
    scores: Tensor, rows: Tensor, tokens: Tensor, count: int, listed: Tensor | None = None
) -> Logprobs:
    """Report on `tokens` int64 [B] under softmax(scores), float32 [m, V] belonging to `rows` int64 [m]; list the best
    `count`, and the ids of `listed` int64 [B, k].

    The chosen value and the listed ones are the same subtraction, so that a token that is in several has the identical
    float in all places."""
    B, device = tokens.shape[0], scores.device
    at = rows.to(device)
    own = tokens[at].clamp(min=0)
    total = log_partition(scores)[:, None]
    score = _at(scores, own[:, None])
    chosen = torch.full((B,), math.nan, device=device)
    chosen[at] = (score - total)[:, 0]
    ranks = torch.full((B,), -1, dtype=torch.int64, device=device)
    rank = before(scores, Last(score[:, 0], own)).sum(dim=1)
    ranks[at] = torch.where(torch.isneginf(score[:, 0]), -1, rank)
    ids = torch.full((B, count), -1, dtype=torch.int64, device=device)
    values = torch.full((B, count), -math.inf, device=device)
    if count:
        best, best_ids = top(scores, min(count, scores.shape[1]))
        possible = best > -math.inf
        ids[at, : best.shape[1]] = torch.where(possible, best_ids, -1)
        values[at, : best.shape[1]] = best - total
    named = None
    if listed is not None:
        named = torch.full(listed.shape, -math.inf, device=device)
        named[at] = _at(scores, listed[rows].to(device)) - total
    return Logprobs(chosen, ranks, ids, values, named)


def _at(scores: Tensor, tokens: Tensor) -> Tensor:
    """Scores [m, k] of `tokens` int64 [m, k]; -inf where there is no such column."""
    width = scores.shape[1]
    found = scores.gather(1, tokens.clamp(0, width - 1))
    return torch.where((tokens >= 0) & (tokens < width), found, -math.inf)
