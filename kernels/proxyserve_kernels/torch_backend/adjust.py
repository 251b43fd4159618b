"""Logit bias, penalties and grammar masks, applied to fused scores in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from proxyserve_kernels.controls import Adjustments


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
        words = adjustments.masks[adjustments.mask_of[masked]].to(device)
        allowed = torch.zeros(masked.shape[0], scores.shape[1], dtype=torch.bool, device=device)
        bits = (words[..., None] >> torch.arange(32, dtype=torch.int32, device=device)) & 1
        bits = bits.flatten(1)[:, : scores.shape[1]].bool()
        allowed[:, : bits.shape[1]] = bits
        rows = masked.to(device)
        # A NaN stays, so that a mask cannot hide a broken row.
        scores[rows] = torch.where(allowed | scores[rows].isnan(), scores[rows], -math.inf)
