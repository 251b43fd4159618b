"""Speculative verification on the device; see `proxyserve_kernels.speculation`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from proxyserve_kernels.controls import PickControls, Picks
from proxyserve_kernels.rows import RowBatch
from proxyserve_kernels.speculation import Drafts, VerifyRule, leading
from proxyserve_kernels.torch_backend.verify import coins
from proxyserve_kernels.triton_backend.device import residual
from proxyserve_kernels.triton_backend.launch import Buffers, Wishes, padded
from proxyserve_kernels.triton_backend.results import read_picks
from proxyserve_kernels.triton_backend.run import run
from proxyserve_kernels.triton_backend.table import RowTable
from proxyserve_kernels.triton_backend.tuning import ROW_OPTIONS, tile_for


def judge(
    batch: RowBatch, controls: PickControls, drafts: Drafts, rule: VerifyRule
) -> tuple[Tensor, Tensor, Picks]:
    """(accepted int64 [n], drawn int64 [n, k + 1]) for `speculation.settle`, and the target's picks without reports."""
    device = batch.device
    rows, tokens = drafts.rows.to(device), drafts.tokens.to(device)
    drafted = tokens >= 0
    forced = torch.full((batch.size,), -1, dtype=torch.int64)
    forced[drafts.rows[:, :-1][drafts.tokens >= 0]] = drafts.tokens[drafts.tokens >= 0]
    silent = replace(controls, raw=(None,) * batch.size, processed=None, forced=forced, listed=None)
    table, buffers, wishes = run(batch, silent)
    drawn = buffers.tokens[rows.clamp(min=0)]
    picks = read_picks(table, buffers, silent, wishes)
    if rule == "shared_noise":
        return leading(drafted & (drawn[:, :-1] == tokens)), drawn, picks
    if drafts.laws is None or drafts.law_controls is None or drafts.law_rows is None:
        raise ValueError("rejection needs laws, law_controls and law_rows of the drafts")
    proposed = torch.full((drafts.laws.size,), -1, dtype=torch.int64)
    proposed[drafts.law_rows[drafts.tokens >= 0]] = drafts.tokens[drafts.tokens >= 0]
    quiet = replace(
        drafts.law_controls,
        raw=(None,) * drafts.laws.size,
        processed=None,
        compare=False,
        forced=proposed,
        listed=None,
    )
    draft_table, draft_buffers, draft_wishes = run(drafts.laws, quiet)
    draft_rows = drafts.law_rows.to(device)
    target = buffers.reports[3].double()[rows[:, :-1].clamp(min=0)]
    ratio = target - draft_buffers.reports[3].double()[draft_rows.clamp(min=0)]
    accepted = leading(drafted & (coins(controls, drafts.rows[:, :-1], device).log() < ratio))
    if drafts.tokens.shape[1] == 0:
        return accepted, drawn, picks
    stopped = accepted < drafted.sum(dim=1)
    place = accepted.clamp(max=drafts.tokens.shape[1] - 1)[:, None]
    stopped_rows = torch.where(stopped, rows.gather(1, place)[:, 0], -1)
    stopped_drafts = torch.where(stopped, draft_rows.gather(1, place)[:, 0], -1)
    corrected = _residual(
        (table, buffers, wishes), (draft_table, draft_buffers, draft_wishes), stopped_rows, stopped_drafts
    )
    column = torch.arange(drawn.shape[1], device=device)
    correct = (column == accepted[:, None]) & (corrected >= 0)[:, None]
    return accepted, torch.where(correct, corrected[:, None], drawn), picks


def _residual(
    target: tuple[RowTable, Buffers, Wishes],
    draft: tuple[RowTable, Buffers, Wishes],
    stopped_rows: Tensor,
    stopped_drafts: Tensor,
) -> Tensor:
    """Tokens drawn from max(p - q, 0), int64 [n]; -1 where nothing is left or nothing stopped."""
    (p, p_buffers, p_wishes), (q, q_buffers, q_wishes) = target, draft
    n, device = stopped_rows.shape[0], p.ints.device
    masses = torch.zeros(n, p.blocks, dtype=torch.float32, device=device)
    tokens = torch.empty(n, dtype=torch.int64, device=device)
    p_values, q_values = _values(p_buffers), _values(q_buffers)
    strides = (
        p.ints.stride(0), p.floats.stride(0), q.ints.stride(0), q.floats.stride(0),
        p_values.stride(0), q_values.stride(0), p.blocks,
    )  # fmt: skip
    constants = {**p.variant.constants(), "ADJUST": p_wishes.adjusts or q_wishes.adjusts}
    constants |= {f"Q_{name}": value for name, value in q.variant.constants().items()}
    tile = tile_for(n, p.blocks)
    inputs = (p.ints, p.floats, p_values, q.ints, q.floats, q_values, stopped_rows, stopped_drafts, masses)
    residual.residual_stats[(n, -(-p.blocks // tile.blocks))](
        *inputs, *strides, TILE=tile.blocks, **tile.options, **constants
    )
    residual.residual_pick[(n,)](
        *inputs, tokens, *strides, BLOCKS=padded(p.blocks), **ROW_OPTIONS, **constants
    )
    return tokens


def _values(buffers: Buffers) -> Tensor:
    """What a pick found of every row, as `device.residual` reads it: float64 [4, bucket]."""
    return torch.stack(
        [
            buffers.reports[5].double(),
            buffers.thresholds.double(),
            buffers.lasts.double(),
            buffers.tokens.double(),
        ]
    )
