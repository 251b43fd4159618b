"""The buffers of a pick as `Picks`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from proxyserve_kernels.controls import MIN_TEMPERATURE, Logprobs, PickControls, Picks
from proxyserve_kernels.triton_backend.launch import Buffers, Wishes
from proxyserve_kernels.triton_backend.table import RowTable


def read_picks(table: RowTable, buffers: Buffers, controls: PickControls, wishes: Wishes) -> Picks:
    """The buffers as `Picks`."""
    B = table.rows
    raw = processed = None
    if wishes.raw is not None:
        counts = buffers.raw_counts[:B].sum(dim=1)
        best = buffers.raw_values[:B, : wishes.raw] - buffers.reports[4, :B, None]
        listed = None if controls.listed is None else buffers.listed[:B]
        raw = _logprobs(buffers.reports[1, :B], counts, buffers.raw_ids[:B, : wishes.raw], best, listed)
    if wishes.processed is not None:
        processed = _processed(table, buffers, controls, wishes.processed)
    weighed = controls.adjustments is not None and controls.adjustments.removed_by is not None
    removed = buffers.removed[:B] if weighed else None
    return Picks(
        buffers.tokens[:B], buffers.valid[:B], buffers.kl[:B], buffers.flips[:B], raw, processed, removed
    )


def _logprobs(
    chosen: Tensor, counts: Tensor, ids: Tensor, values: Tensor, listed: Tensor | None = None
) -> Logprobs:
    return Logprobs(chosen, torch.where(torch.isneginf(chosen), -1, counts), ids, values, listed)


def _processed(table: RowTable, buffers: Buffers, controls: PickControls, wanted: int) -> Logprobs:
    """The lists are of the law before filters: cut them; and greedy rows have one possible token."""
    B, device = table.rows, buffers.tokens.device
    ids, scores = buffers.processed_ids[:B, :wanted], buffers.processed_values[:B, :wanted]
    sampled = (controls.temperature >= MIN_TEMPERATURE).to(device)
    filters = (controls.top_k > 0) | (controls.top_p < 1.0) | (controls.min_p > 0.0)
    if wanted and bool(filters.any()):
        threshold, last = buffers.thresholds[:B, None], buffers.lasts[:B, None]
        kept = (scores > threshold) | ((scores == threshold) & (ids <= last))
        kept |= ~filters.to(device)[:, None]
        ids, scores = torch.where(kept, ids, -1), torch.where(kept, scores, -math.inf)
    values = scores - buffers.reports[5, :B, None]
    if wanted and not bool((controls.temperature >= MIN_TEMPERATURE).all()):
        place = torch.arange(wanted, device=device)
        only = torch.where(place == 0, buffers.tokens[:B, None], -1)
        ids = torch.where(sampled[:, None], ids, only)
        values = torch.where(sampled[:, None], values, torch.where(only >= 0, 0.0, -math.inf))
    counts = buffers.processed_counts[:B].sum(dim=1)
    return _logprobs(buffers.reports[3, :B], counts, ids, values)
