"""Gather the rows of a batch and fuse them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from proxyserve_kernels.rows import ABSENT, CLIP, FUSED, RowBatch, Rules, Supports
from proxyserve_kernels.torch_backend.blocks import log_partition
from proxyserve_kernels.torch_backend.filters import filtered


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """`scores` float32 [B, V], V the batch's width, -inf outside each row's own. `changed` int64 [m], host: the rows
    that are more than their reference; `reference` float32 [m, V]: the reference law's scores of those."""

    scores: Tensor
    changed: Tensor
    reference: Tensor


def fuse(batch: RowBatch, *, compare: bool = True) -> Fused:
    """Fuse every row. Inputs become float32 before anything else; a difference of two rows is formed before it meets
    the base, so that what the two have in common cancels unrounded. A NaN stays in its row. Without `compare` there is
    no reference, and `changed` is empty."""
    scores = take(batch, batch.base, batch.widths)
    rules = batch.rules
    changed = _changed(batch) if compare else torch.zeros(0, dtype=torch.int64)
    if rules is None:
        if not changed.numel():
            add_terms(batch, scores)
            return Fused(scores, changed, scores[:0])
        reference = scores.clone() if changed.numel() == batch.size else scores[changed.to(scores.device)]
        add_terms(batch, scores)
        return Fused(scores, changed, reference)
    reference = scores[:0]
    if changed.numel():
        reference = take(batch, rules.reference[changed], batch.widths[changed])
    base = scores.clone()
    weight = rules.base_weight.to(scores.device)[:, None]
    # An id with no score stays one: -inf times a weight of 0 or less would be NaN or +inf.
    scores = torch.where(torch.isneginf(scores), scores, scores * weight)
    unfused = scores.clone() if rules.supports is not None else scores
    add_terms(batch, scores)
    means = (~rules.power.isnan()).nonzero()[:, 0]
    if means.numel():
        at = means.to(scores.device)
        scores[at] = _power_mean(batch, rules, means, base[at])
    if rules.supports is not None:
        _restrict(batch, rules.supports, scores, unfused)
    return Fused(scores, changed, reference)


def _changed(batch: RowBatch) -> Tensor:
    """Rows that may differ from their reference, int64 [m]."""
    changed = (batch.positive[..., 0] != ABSENT).any(dim=1)
    rules = batch.rules
    if rules is not None:
        changed |= (
            (rules.reference != batch.base).any(dim=1) | (rules.base_weight != 1) | ~rules.power.isnan()
        )
        if rules.supports is not None:
            changed |= (rules.supports.of[..., 0] != ABSENT).any(dim=1)
    return changed.nonzero()[:, 0]


def take(batch: RowBatch, refs: Tensor, widths: Tensor) -> Tensor:
    """Rows `refs` int64 [n, 2] of the sources as a new float32 [n, batch.width], -inf from `widths` int64 [n] on."""
    taken = torch.empty(refs.shape[0], batch.width, dtype=torch.float32, device=batch.device)
    widest, narrowest = int(widths.max()), int(widths.min())
    for source, members in _by_source(refs[:, 0]):
        rows = _rows(batch.sources[source], refs[members, 1])[:, :widest]
        if members.numel() == refs.shape[0]:
            taken[:, :widest].copy_(rows)
        else:
            taken[members.to(batch.device), : rows.shape[1]] = rows.float()
    taken[:, widest:] = -math.inf
    if narrowest < widest:
        ids = torch.arange(narrowest, widest, device=batch.device)
        taken[:, narrowest:widest].masked_fill_(ids >= widths.to(batch.device)[:, None], -math.inf)
    return taken


def _by_source(sources: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(source, places in `sources` that name it)."""
    for source in torch.unique(sources).tolist():
        yield source, (sources == source).nonzero()[:, 0]


def _rows(source: Tensor, rows: Tensor) -> Tensor:
    """`source[rows]`, without a copy where the rows are a run of neighbours."""
    first, count = int(rows[0]), rows.shape[0]
    if torch.equal(rows, torch.arange(first, first + count)):
        return source[first : first + count]
    return source.index_select(0, rows.to(source.device))


def pairs(batch: RowBatch, term: int, *, idle: bool = False) -> Iterator[tuple[Tensor, int, int]]:
    """Rows that have term number `term`, grouped by the sources of its two rows: (rows int64 [n] on the host, source
    of the positives, source of the negatives or ABSENT). Terms of weight 0 are left out unless `idle`."""
    sources = torch.stack([batch.positive[:, term, 0], batch.negative[:, term, 0]], dim=1)
    present = sources[:, 0] != ABSENT
    if not idle:
        present &= batch.weights[:, term].cpu() != 0
    for positive, negative in torch.unique(sources[present], dim=0).tolist():
        same = present & (sources[:, 0] == positive) & (sources[:, 1] == negative)
        yield same.nonzero()[:, 0], positive, negative


def deltas(batch: RowBatch, term: int, rows: Tensor, positive: int, negative: int) -> Tensor:
    """positive - negative of one term for `rows`, float32 [n, widest of the rows], by the policy for -inf. What lies
    beyond a row's own width is undefined."""
    width = int(batch.widths[rows].max())
    above = _rows(batch.sources[positive], batch.positive[rows, term, 1])[:, :width].float()
    rules = batch.rules
    normalise = None if rules is None else rules.normalise[rows] | rules.one_sided[rows]
    clip = CLIP if rules is None else rules.clip[rows].to(above.device)[:, None]
    shift = None
    if normalise is not None and bool(normalise.any()):
        shift = _log_partitions(batch, batch.positive[rows, term], rows)
        if negative != ABSENT:
            shift -= _log_partitions(batch, batch.negative[rows, term], rows)
        shift = torch.where(normalise.to(shift.device), shift, 0.0)[:, None]
    if negative == ABSENT:
        delta = above.clone() if shift is None else above - shift
        return (
            delta if bool(torch.isfinite(delta.sum())) else torch.where(torch.isneginf(above), -clip, delta)
        )
    below = _rows(batch.sources[negative], batch.negative[rows, term, 1])[:, :width].float()
    delta = above - below
    if shift is not None:
        delta -= shift
    if not bool(torch.isfinite(delta.sum())):
        lost, gained = torch.isneginf(above), torch.isneginf(below)
        # Times 0: what the other row holds does not matter, unless it is a NaN.
        delta = torch.where(lost, 0.0 * below - clip, delta)
        delta = torch.where(gained, 0.0 * above + clip, delta)
        delta = torch.where(lost & gained, 0.0, delta)
    return delta


def _log_partitions(batch: RowBatch, refs: Tensor, rows: Tensor) -> Tensor:
    return log_partition(take(batch, refs, batch.widths[rows]))


def add_terms(batch: RowBatch, scores: Tensor) -> None:
    """Add the terms of all sums to `scores` float32 [B, V], in place, term by term: a row adds its terms in the same
    order whatever its neighbours have."""
    rules = batch.rules
    weights = batch.weights.to(scores.device)
    for term in range(batch.terms):
        for rows, positive, negative in pairs(batch, term):
            if rules is not None:
                rows = rows[rules.power[rows].isnan()]
                if not rows.numel():
                    continue
            delta = deltas(batch, term, rows, positive, negative)
            at = rows.to(scores.device)
            if rules is not None and bool(rules.one_sided[rows].any()):
                one_sided = rules.one_sided[rows].to(scores.device)[:, None]
                delta = torch.where(one_sided, delta.clamp(min=0.0), delta)
            delta.mul_(weights[at, term][:, None])
            # Beyond a row's own width its score is -inf, and a finite delta there changes nothing.
            view = scores[:, : delta.shape[1]]
            if rows.shape[0] < batch.size:
                view.index_add_(0, at, delta)
            else:
                view.add_(delta)
            if not bool((batch.widths[rows] == delta.shape[1]).all()):
                # What a source holds beyond the width may be NaN or inf.
                ids = torch.arange(scores.shape[1], device=scores.device)
                outside = ids >= batch.widths[rows].to(scores.device)[:, None]
                scores[at] = scores[at].masked_fill_(outside, -math.inf)


def _power_mean(batch: RowBatch, rules: Rules, rows: Tensor, base: Tensor) -> Tensor:
    """log((sum of w_m * p_m ** r) ** (1 / r)) for `rows`, whose base scores are `base` float32 [n, V]."""
    laws = [base - log_partition(base)[:, None]]
    weights = [rules.base_weight[rows]]
    for term in range(batch.terms):
        law = torch.full_like(base, -math.inf)
        weight = torch.zeros(rows.shape[0])
        here = (batch.positive[rows, term, 0] != ABSENT).nonzero()[:, 0]
        if here.numel():
            taken = take(batch, batch.positive[rows[here], term], batch.widths[rows[here]])
            law[here.to(base.device)] = taken - log_partition(taken)[:, None]
            weight[here] = batch.weights[rows[here], term].cpu()
        laws.append(law)
        weights.append(weight)
    law = torch.stack(laws, dim=1)  # [n, M, V]
    weight = torch.stack(weights, dim=1).to(base.device)[..., None]  # [n, M, 1]
    power = rules.power[rows].to(base.device)[:, None, None]
    used = weight > 0
    # A law that is not used must not decide an extreme, nor turn -inf * 0 into NaN.
    largest = torch.where(used, law, -math.inf).amax(dim=1)
    smallest = torch.where(used, law, math.inf).amin(dim=1)
    product = torch.where(used, weight * law, 0.0).sum(dim=1)
    safe = torch.where((power == 0) | power.isinf(), 1.0, power)
    mean = torch.logsumexp(torch.where(used, safe * law + weight.log(), -math.inf), dim=1) / safe[:, 0]
    r = power[:, 0]
    result = torch.where(r == 0, product, mean)
    result = torch.where(r == math.inf, largest, result)
    result = torch.where(r == -math.inf, smallest, result)
    ids = torch.arange(base.shape[1], device=base.device)
    result = torch.where(used.any(dim=1), result, -math.inf)
    return result.masked_fill_(ids >= batch.widths[rows].to(base.device)[:, None], -math.inf)


def _restrict(batch: RowBatch, supports: Supports, scores: Tensor, unfused: Tensor) -> None:
    """Apply the rows' supports to `scores` in place; outside, a row that is not masked gets its `unfused` score."""
    sources = supports.of[..., 0]
    rows = (sources != ABSENT).any(dim=1).nonzero()[:, 0]
    if not rows.numel():
        return
    at = rows.to(scores.device)
    broken = torch.zeros(rows.shape[0], scores.shape[1], dtype=torch.bool, device=scores.device)
    inside = torch.zeros(rows.shape[0], scores.shape[1], dtype=torch.bool, device=scores.device)
    for slot in range(sources.shape[1]):
        here = (sources[rows, slot] != ABSENT).nonzero()[:, 0]
        if not here.numel():
            continue
        own = rows[here]
        law = scores[own.to(scores.device)]
        models = (sources[own, slot] != FUSED).nonzero()[:, 0]
        if models.numel():
            law[models.to(scores.device)] = take(
                batch, supports.of[own[models], slot], batch.widths[own[models]]
            )
        kept = filtered(law, supports.top_k[own], supports.top_p[own], supports.min_p[own])
        inside[here.to(scores.device)] |= ~torch.isneginf(kept)
        broken[here.to(scores.device)] |= law.isnan()
    outside = torch.where(supports.removes[rows].to(scores.device)[:, None], -math.inf, unfused[at])
    # A NaN is inside no law, but must stay to be seen.
    restricted = torch.where(inside | scores[at].isnan(), scores[at], outside)
    scores[at] = restricted.masked_fill_(broken, math.nan)
