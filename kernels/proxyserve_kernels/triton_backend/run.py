"""From a batch to filled buffers: build the table, find what its rules need to know first, launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from proxyserve_kernels.controls import MIN_TEMPERATURE, PickControls
from proxyserve_kernels.rows import ABSENT, FUSED, RowBatch, Rules, Supports
from proxyserve_kernels.triton_backend.device.layout import BASE_SHIFT
from proxyserve_kernels.triton_backend.launch import Buffers, Wishes, launch_pick
from proxyserve_kernels.triton_backend.table import RowTable, build_table
from proxyserve_kernels.triton_backend.tuning import ROOM


def run(
    batch: RowBatch, controls: PickControls, *, always_filter: bool = False, room: int = ROOM
) -> tuple[RowTable, Buffers, Wishes]:
    """One pick's launches over `batch`. With `always_filter` thresholds are written also where nothing filters. `room`:
    places for the best tokens of a row."""
    wishes = wishes_of(controls)
    if always_filter:
        wishes = replace(wishes, filters=True)
    table = prepared_table(batch, controls)
    named = 0 if table.listed is None else table.listed.shape[1]
    buffers = Buffers.allocate(table.bucket, table.blocks, wishes, batch.device, room, named)
    launch_pick(table, buffers, wishes)
    return table, buffers, wishes


def wishes_of(controls: PickControls) -> Wishes:
    """What the rows of a batch want together."""
    sampled = controls.temperature >= MIN_TEMPERATURE
    scales = sampled & (controls.temperature != 1)
    filters = (controls.top_k > 0) | (controls.top_p < 1.0) | (controls.min_p > 0.0)
    return Wishes(
        filters=bool((filters & sampled).any()),
        adjusts=controls.adjustments is not None,
        scales=bool(scales.any()),
        compares=controls.compare,
        raw=_most(controls.raw),
        processed=_most(controls.processed),
    )


def _most(wishes: Sequence[int | None] | None) -> int | None:
    return max((wish for wish in wishes or () if wish is not None), default=None)


def prepared_table(batch: RowBatch, controls: PickControls | None) -> RowTable:
    """The table of a batch, with the log-partitions and support thresholds that its rules need filled in."""
    table = build_table(batch, controls)
    if batch.rules is not None:
        _fill_shifts(batch, batch.rules, table)
        if batch.rules.supports is not None:
            _fill_thresholds(batch, batch.rules, batch.rules.supports, table)
    return table


def _fill_shifts(batch: RowBatch, rules: Rules, table: RowTable) -> None:
    """Log-partitions of single lanes: what normalised terms and power means subtract."""
    means = ~rules.power.isnan()
    normalised = (rules.normalise | rules.one_sided | means)[:, None]
    above = ((batch.positive[..., 0] != ABSENT) & normalised).nonzero()
    below = ((batch.negative[..., 0] != ABSENT) & normalised).nonzero()
    bases = means.nonzero()[:, 0]
    if not above.numel() and not bases.numel():
        return
    refs = torch.cat([batch.positive[tuple(above.T)], batch.negative[tuple(below.T)], batch.base[bases]])
    buffers = _lanes(batch, refs, torch.cat([above[:, 0], below[:, 0], bases]), None)
    raw_partitions = buffers.reports[4, : refs.shape[0]]
    of_above, of_below, of_bases = raw_partitions.split([len(above), len(below), len(bases)])
    # A term that has no positive row has no negative one either, so every shift begins with its positive's.
    shifts = torch.zeros(table.bucket, table.variant.terms, device=batch.device)
    shifts[tuple(above.T.to(batch.device))] = of_above
    shifts[tuple(below.T.to(batch.device))] -= of_below
    table.shift_columns().copy_(shifts)
    table.floats[bases.to(batch.device), BASE_SHIFT.value] = of_bases


def _fill_thresholds(batch: RowBatch, rules: Rules, supports: Supports, table: RowTable) -> None:
    """The last kept score and id of every support law."""
    sources = supports.of[..., 0]
    single = ((sources != ABSENT) & (sources != FUSED)).nonzero()
    fused = (sources == FUSED).nonzero()
    if single.numel():
        rows, slots = single.unbind(dim=1)
        buffers = _lanes(batch, supports.of[rows, slots], rows, supports)
        _store_thresholds(table, buffers, rows, slots)
    if fused.numel():
        rows, slots = fused.unbind(dim=1)
        buffers = run(_rows(batch, rules, rows), _filters(supports, rows), always_filter=True)[1]
        _store_thresholds(table, buffers, rows, slots)


def _store_thresholds(table: RowTable, buffers: Buffers, rows: Tensor, slots: Tensor) -> None:
    at = rows.to(table.ints.device), slots.to(table.ints.device)
    table.threshold_columns()[at] = buffers.thresholds[: rows.shape[0]]
    table.last_columns()[at] = buffers.lasts[: rows.shape[0]]


def _lanes(batch: RowBatch, refs: Tensor, rows: Tensor, supports: Supports | None) -> Buffers:
    """Run single lanes `refs` int64 [n, 2], with the widths (and support parameters) of `rows` int64 [n]."""
    none = torch.zeros(rows.shape[0], 0, 2, dtype=torch.int64)
    plain = RowBatch(batch.sources, refs, batch.widths[rows], none, none, torch.zeros(rows.shape[0], 0))
    controls = PickControls.greedy(rows.shape[0]) if supports is None else _filters(supports, rows)
    return run(plain, replace(controls, compare=False), always_filter=supports is not None)[1]


def _rows(batch: RowBatch, rules: Rules, rows: Tensor) -> RowBatch:
    """Those rows without their supports."""
    own = Rules(
        rules.base_weight[rows],
        rules.power[rows],
        rules.one_sided[rows],
        rules.normalise[rows],
        rules.clip[rows],
        rules.reference[rows],
    )
    weights = batch.weights[rows.to(batch.weights.device)]
    return RowBatch(
        batch.sources,
        batch.base[rows],
        batch.widths[rows],
        batch.positive[rows],
        batch.negative[rows],
        weights,
        own,
    )


def _filters(supports: Supports, rows: Tensor) -> PickControls:
    """Supports as the filters of a law at temperature 1."""
    n = rows.shape[0]
    return replace(
        PickControls.greedy(n),
        temperature=torch.ones(n),
        top_k=supports.top_k[rows],
        top_p=supports.top_p[rows],
        min_p=supports.min_p[rows],
        compare=False,
    )
