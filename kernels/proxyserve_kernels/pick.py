"""The one call per step: fuse a mixed batch, adjust, filter, draw, and say how likely the drawn tokens were."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from proxyserve_kernels.adjust import Adjustments
from proxyserve_kernels.draw import draw
from proxyserve_kernels.filters import apply_filters
from proxyserve_kernels.rows import RowBatch, fuse


@dataclass(frozen=True, slots=True, eq=False)
class PickControls:
    """How each row's token is chosen. All tensors have one entry per row, on the device of the logits.

    `temperature` float32 (0 = greedy), `top_k` int64 (0 = off), `top_p` float32 (1 = off), `min_p` float32 (0 = off),
    `seeds` int64 (64 bits), `positions` int64 (the position in the text that the token will have).
    `want_logprobs[r]` is None, or how many of the most likely tokens to list (0 = the chosen one only).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    want_logprobs: tuple[int | None, ...]
    adjustments: Adjustments | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Picks:
    """One token per row and what is known about it.

    `tokens` int64 [B]; -1 where `valid` [B] bool is False (the row held a NaN, +inf, or no token at all).
    `logprobs[r]` is None or (log-prob of the token, top ids, top log-probs) under the fused law before adjustments,
    temperature and filters, in nats. `kl` float32 [B] is KL(fused || base) of that law, `flips` bool [B] whether its
    argmax differs from the base's; both are zero for rows without terms.
    """

    tokens: Tensor
    valid: Tensor
    logprobs: tuple[tuple[float, list[int], list[float]] | None, ...]
    kl: Tensor
    flips: Tensor


def fuse_and_pick(batch: RowBatch, controls: PickControls) -> Picks:
    """Fuse `batch`, then choose a token per row as `controls` say. Plain eager torch; runs on any device."""
    fused, base = fuse(batch)
    best = fused.argmax(dim=1)
    kl, flips = _compare(fused, base, best, batch)
    listed = _wanted(controls.want_logprobs)
    raw = fused[listed] if listed else None
    if controls.adjustments is not None:
        if fused is base:
            fused = base.clone()
        controls.adjustments.apply(fused)
        best = fused.argmax(dim=1)
    peak = fused.gather(1, best[:, None])[:, 0]
    # A NaN anywhere makes the sum NaN; max and argmax alone may step over it on some devices.
    valid = torch.isfinite(peak) & ~torch.isnan(fused.sum(dim=1))
    tokens = _choose(fused, best, controls)
    tokens = torch.where(valid, tokens, -1)
    logprobs: list[tuple[float, list[int], list[float]] | None] = [None] * batch.size
    if raw is not None:
        for row, entry in zip(listed, _logprobs(raw, tokens[listed], controls, listed), strict=True):
            logprobs[row] = entry
    return Picks(tokens, valid, tuple(logprobs), kl, flips)


def _choose(scores: Tensor, best: Tensor, controls: PickControls) -> Tensor:
    """Greedy rows take `best`; the others are drawn. May overwrite `scores`."""
    sampled = (controls.temperature > 0).nonzero()[:, 0]
    if not sampled.numel():
        return best
    law = scores[sampled] / controls.temperature[sampled, None]
    top_k, top_p, min_p = controls.top_k[sampled], controls.top_p[sampled], controls.min_p[sampled]
    filtered = ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)).nonzero()[:, 0]
    if filtered.numel():
        kept = law[filtered]
        apply_filters(kept, top_k[filtered], top_p[filtered], min_p[filtered])
        law[filtered] = kept
    tokens = best.clone()
    tokens[sampled] = draw(law, controls.seeds[sampled], controls.positions[sampled])
    return tokens


def _compare(fused: Tensor, base: Tensor, best: Tensor, batch: RowBatch) -> tuple[Tensor, Tensor]:
    """KL(fused || base) and flips of the rows that have terms."""
    kl = torch.zeros(batch.size, dtype=torch.float32, device=fused.device)
    flips = torch.zeros(batch.size, dtype=torch.bool, device=fused.device)
    if not batch.groups:
        return kl, flips
    rows = torch.unique(torch.cat([group.rows for group in batch.groups]))
    if rows.shape[0] < batch.size:
        fused, base, best = fused[rows], base[rows], best[rows]
    log_p = torch.log_softmax(fused, dim=1)
    log_q = torch.log_softmax(base, dim=1)
    p = log_p.exp()
    # -inf in both (outside the width) would give 0 * NaN; such tokens have p = 0 and add nothing.
    difference = log_p.sub_(log_q).masked_fill_(p == 0, 0.0)
    kl[rows] = p.mul_(difference).sum(dim=1)
    flips[rows] = best != base.argmax(dim=1)
    return kl, flips


def _wanted(wishes: tuple[int | None, ...]) -> list[int]:
    return [row for row, wish in enumerate(wishes) if wish is not None]


def _logprobs(
    raw: Tensor, tokens: Tensor, controls: PickControls, listed: list[int]
) -> list[tuple[float, list[int], list[float]]]:
    """Log-probs of the chosen tokens and of the most likely ones. Both are read from one tensor, so that a chosen token
    that is also the most likely one has the identical float in both places."""
    law = torch.log_softmax(raw, dim=1)
    chosen = law.gather(1, tokens.clamp(min=0)[:, None])[:, 0].tolist()
    most = max(controls.want_logprobs[row] or 0 for row in listed)
    if most == 0:
        return [(value, [], []) for value in chosen]
    ids, values = _top(law, min(most, law.shape[1]))
    entries = []
    for row, value, row_ids, row_values in zip(listed, chosen, ids.tolist(), values.tolist(), strict=True):
        wanted = controls.want_logprobs[row] or 0
        possible = sum(
            entry > -math.inf for entry in row_values[:wanted]
        )  # padding and impossible ids come last
        entries.append((value, row_ids[:possible], row_values[:possible]))
    return entries


def _top(law: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best ids and values per row in the order (value descending, id ascending)."""
    # One more than wanted shows whether a tie crosses the end of the list.
    values, ids = law.topk(min(count + 1, law.shape[1]), dim=1)
    tied = (
        values[:, count - 1] == values[:, -1] if values.shape[1] > count else torch.zeros(0, dtype=torch.bool)
    )
    if bool(tied.any()):
        values, ids = law.sort(dim=1, descending=True, stable=True)
    else:
        ids, by_id = ids.sort(dim=1)
        values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, by_value)
    return ids[:, :count], values[:, :count]
