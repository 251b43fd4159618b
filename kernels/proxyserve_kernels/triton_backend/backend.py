"""The Triton backend behind `proxyserve_kernels.backend.Backend`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from proxyserve_kernels.backend import BackendName
from proxyserve_kernels.controls import MIN_TEMPERATURE, Logprobs, PickControls, Picks
from proxyserve_kernels.rows import ABSENT, FUSED, RowBatch, Rules, Supports
from proxyserve_kernels.triton_backend.compilations import compiled_variants
from proxyserve_kernels.triton_backend.device import pick as pick_kernels
from proxyserve_kernels.triton_backend.device import select, stats
from proxyserve_kernels.triton_backend.launch import Buffers, Wishes, interpreted, launch_pick, write_scores
from proxyserve_kernels.triton_backend.table import RowTable, build_table

KERNELS = (
    stats.fuse_stats,
    stats.filter_blocks,
    stats.write_scores,
    stats.count_before,
    select.best_tokens,
    select.search,
    pick_kernels.pick,
)


class TritonBackend:
    """Triton kernels on one CUDA device, or in Triton's interpreter on the CPU for tests.

    Raises ValueError for a device that is neither.
    """

    name: BackendName = "triton"

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" and not interpreted():
            raise ValueError(f"Kernel backend 'triton' needs a CUDA device, not {device}; use 'torch'.")
        self.device = device
        self._warm = 0

    @property
    def compilations(self) -> int:
        """See `Backend`."""
        return compiled_variants(KERNELS) - self._warm

    def fused_scores(self, batch: RowBatch) -> Tensor:
        """See `Backend`."""
        return write_scores(prepared_table(batch, None))

    def pick(self, batch: RowBatch, controls: PickControls) -> Picks:
        """See `Backend`."""
        wishes = wishes_of(controls)
        table = prepared_table(batch, controls)
        buffers = Buffers.allocate(table.bucket, table.blocks, wishes, batch.device)
        launch_pick(table, buffers, wishes)
        return read_picks(table, buffers, controls, wishes)


def wishes_of(controls: PickControls) -> Wishes:
    """What the rows of a batch want together."""
    sampled = controls.temperature >= MIN_TEMPERATURE
    filters = (controls.top_k > 0) | (controls.top_p < 1.0) | (controls.min_p > 0.0)
    return Wishes(
        filters=bool((filters & sampled).any()),
        adjusts=controls.adjustments is not None,
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
    normalised = rules.normalise | rules.one_sided | means
    entries = [
        (refs[row, term], row, term, sign)
        for refs, sign in ((batch.positive, 1.0), (batch.negative, -1.0))
        for row, term in ((refs[..., 0] != ABSENT) & normalised[:, None]).nonzero().tolist()
    ]
    bases = means.nonzero()[:, 0].tolist()
    if not entries and not bases:
        return
    refs = torch.stack([*(entry[0] for entry in entries), *(batch.base[row] for row in bases)])
    rows = torch.tensor([*(entry[1] for entry in entries), *bases])
    buffers = _lanes(batch, refs, rows, None)
    partitions = buffers.reports[4]
    if entries:
        device = batch.device
        at = rows[: len(entries)].to(device), torch.tensor([entry[2] for entry in entries], device=device)
        signs = torch.tensor([entry[3] for entry in entries], device=device)
        shifts = torch.zeros_like(table.shift_columns())
        shifts.index_put_(at, signs * partitions[: len(entries)], accumulate=True)
        table.shift_columns().copy_(shifts)
    if bases:
        from proxyserve_kernels.triton_backend.device.layout import BASE_SHIFT

        shift = partitions[len(entries) : len(entries) + len(bases)]
        table.floats[torch.tensor(bases, device=batch.device), BASE_SHIFT.value] = shift


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
        buffers = _run(_rows(batch, rules, rows), _filters(supports, rows))
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
    return _run(plain, controls)


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
    )


def _run(batch: RowBatch, controls: PickControls) -> Buffers:
    # Thresholds are written for every row, also where nothing filters.
    wishes = replace(wishes_of(controls), filters=True)
    table = prepared_table(batch, controls)
    buffers = Buffers.allocate(table.bucket, table.blocks, wishes, batch.device)
    launch_pick(table, buffers, wishes)
    return buffers


def read_picks(table: RowTable, buffers: Buffers, controls: PickControls, wishes: Wishes) -> Picks:
    """The buffers as `Picks`."""
    B = table.rows
    raw = processed = None
    if wishes.raw is not None:
        counts = buffers.raw_counts[:B].sum(dim=1)
        listed = buffers.raw_values[:B, : wishes.raw] - buffers.reports[4, :B, None]
        raw = _logprobs(buffers.reports[1, :B], counts, buffers.raw_ids[:B, : wishes.raw], listed)
    if wishes.processed is not None:
        processed = _processed(table, buffers, controls, wishes.processed)
    return Picks(buffers.tokens[:B], buffers.valid[:B], buffers.kl[:B], buffers.flips[:B], raw, processed)


def _logprobs(chosen: Tensor, counts: Tensor, ids: Tensor, values: Tensor) -> Logprobs:
    return Logprobs(chosen, torch.where(torch.isneginf(chosen), -1, counts), ids, values)


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
