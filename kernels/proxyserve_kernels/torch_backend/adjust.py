"""Logit bias, penalties and grammar masks, applied to fused scores in place; and what a mask takes away."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from proxyserve_kernels.controls import Adjustments
from proxyserve_kernels.torch_backend.blocks import row_sum


def adjust(scores: Tensor, adjustments: Adjustments) -> None:
    """Change `scores` float32 [B, V] in place: bias, then penalties, then masks."""
    device = scores.device
    if adjustments.bias_rows.numel():
        at = adjustments.bias_rows.to(device), adjustments.bias_ids.to(device)
        scores[at] += adjustments.bias_values.to(device)
    if adjustments.seen_rows.numel():
        at = adjustments.seen_rows.to(device), adjustments.seen_ids.to(device)
        counts, repetition = adjustments.counts.to(device), adjustments.repetition.to(device)
        inverse = adjustments.repetition.reciprocal().to(
            device
        )  # the kernels multiply, and both give the same bits
        seen = scores[at]
        seen = seen * torch.where(seen > 0, inverse, repetition)
        seen -= adjustments.frequency.to(device) * counts + adjustments.presence.to(device) * (counts > 0)
        scores[at] = seen
    if adjustments.masks is not None and adjustments.mask_of is not None:
        masked = (adjustments.mask_of >= 0).nonzero()[:, 0]
        allowed = _allowed(adjustments.masks[adjustments.mask_of[masked]], scores)
        rows = masked.to(device)
        own = scores[rows]
        # A NaN stays, so that a mask cannot hide a broken row.
        scores[rows] = torch.where(allowed | own.isnan(), own, -math.inf)


def removed(scores: Tensor, adjustments: Adjustments) -> Tensor | None:
    """`Picks.removed` from the raw `scores` float32 [B, V]."""
    if adjustments.masks is None or adjustments.removed_by is None:
        return None
    mass = torch.zeros(scores.shape[0], device=scores.device)
    asked = (adjustments.removed_by >= 0).nonzero()[:, 0]
    if asked.numel():
        rows = asked.to(scores.device)
        p = scores[rows]
        p = p.sub_(p.amax(dim=1, keepdim=True)).exp_()
        whole = row_sum(p)
        lost = row_sum(
            p.masked_fill_(_allowed(adjustments.masks[adjustments.removed_by[asked]], scores), 0.0)
        )
        # The same sum with some of its terms left out, so at most 1.
        mass[rows] = lost / whole
    return mass


def _allowed(words: Tensor, scores: Tensor) -> Tensor:
    """Masks int32 [n, words] spelled out for the columns of `scores` [B, V]: bool [n, V] on its device."""
    eight = _eight_at_once(scores.device)[words.to(scores.device).view(torch.uint8).int()]
    bits = eight.view(torch.bool)[:, : scores.shape[1]]
    return torch.nn.functional.pad(bits, (0, scores.shape[1] - bits.shape[1]))


@cache
def _eight_at_once(device: torch.device) -> Tensor:
    """The bits of every byte, lowest first, as eight bytes of 0 or 1: int64 [256]."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return bits.to(torch.uint8).view(torch.int64)[:, 0].to(device)
