"""A batch a few rows at a time, on a CPU.

Every operation of the torch backend passes over all columns of its rows. With 32 rows of 32,000 columns each of its
temporaries is 4 MB: too large for a core's cache, and large enough that the allocator returns it to the system and gets
it back page by page. No row's result depends on the rows beside it, so nothing changes but the time. Measured on a
2-core AVX-512 machine, one thread, fusing and comparing 32 rows of 32,000, ms for parts of 32 / 16 / 8 / 4 / 1 rows:
12.0 / 9.8 / 5.8 / 5.8 / 6.8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from proxyserve_kernels.controls import Adjustments, Logprobs, PickControls, Picks
from proxyserve_kernels.rows import RowBatch, Rules

#: Rows of one part.
PART = 8


def in_parts(
    batch: RowBatch, controls: PickControls, size: int = PART
) -> Iterator[tuple[RowBatch, PickControls]]:
    """The batch and its controls, at most `size` rows at a time."""
    for first in range(0, batch.size, size):
        rows = slice(first, min(first + size, batch.size))
        yield _batch(batch, rows), _controls(controls, rows)


def _batch(batch: RowBatch, rows: slice) -> RowBatch:
    return RowBatch(
        sources=batch.sources,
        base=batch.base[rows],
        widths=batch.widths[rows],
        positive=batch.positive[rows],
        negative=batch.negative[rows],
        weights=batch.weights[rows],
        rules=None if batch.rules is None else _rules(batch.rules, rows),
    )


def _rules(rules: Rules, rows: slice) -> Rules:
    supports = rules.supports
    if supports is not None:
        supports = replace(
            supports, **{name.name: getattr(supports, name.name)[rows] for name in fields(supports)}
        )
    own = {name.name: getattr(rules, name.name)[rows] for name in fields(rules) if name.name != "supports"}
    return replace(rules, supports=supports, **own)


def _controls(controls: PickControls, rows: slice) -> PickControls:
    adjustments, forced, listed = controls.adjustments, controls.forced, controls.listed
    return PickControls(
        temperature=controls.temperature[rows],
        top_k=controls.top_k[rows],
        top_p=controls.top_p[rows],
        min_p=controls.min_p[rows],
        seeds=controls.seeds[rows],
        positions=controls.positions[rows],
        raw=controls.raw[rows],
        processed=None if controls.processed is None else controls.processed[rows],
        adjustments=None if adjustments is None else _adjustments(adjustments, rows),
        forced=None if forced is None else forced[rows],
        listed=None if listed is None else listed[rows],
        compare=controls.compare,
    )


def _adjustments(adjustments: Adjustments, rows: slice) -> Adjustments:
    biased = _inside(adjustments.bias_rows, rows)
    seen = _inside(adjustments.seen_rows, rows)
    mask_of, removed_by = adjustments.mask_of, adjustments.removed_by
    return Adjustments(
        bias_rows=adjustments.bias_rows[biased] - rows.start,
        bias_ids=adjustments.bias_ids[biased],
        bias_values=adjustments.bias_values[biased],
        seen_rows=adjustments.seen_rows[seen] - rows.start,
        seen_ids=adjustments.seen_ids[seen],
        counts=adjustments.counts[seen],
        repetition=adjustments.repetition[seen],
        presence=adjustments.presence[seen],
        frequency=adjustments.frequency[seen],
        masks=adjustments.masks,
        mask_of=None if mask_of is None else mask_of[rows],
        removed_by=None if removed_by is None else removed_by[rows],
    )


def _inside(entries: Tensor, rows: slice) -> Tensor:
    return (entries >= rows.start) & (entries < rows.stop)


def joined(parts: Sequence[Picks]) -> Picks:
    """The picks of the whole batch."""
    sizes = [part.tokens.shape[0] for part in parts]

    def every(get: Callable[[Picks], Tensor]) -> Tensor:
        return torch.cat([get(part) for part in parts])

    return Picks(
        tokens=every(lambda part: part.tokens),
        valid=every(lambda part: part.valid),
        kl=every(lambda part: part.kl),
        flips=every(lambda part: part.flips),
        raw=_logprobs([part.raw for part in parts], sizes),
        processed=_logprobs([part.processed for part in parts], sizes),
        removed=None
        if parts[0].removed is None
        else torch.cat([part.removed for part in parts if part.removed is not None]),
    )


def _logprobs(parts: Sequence[Logprobs | None], sizes: Sequence[int]) -> Logprobs | None:
    """Parts of which no row asked have None, others list as many tokens as one of their own rows asked for."""
    asked = [part for part in parts if part is not None]
    if not asked:
        return None
    count = max(part.ids.shape[1] for part in asked)
    named = None if asked[0].listed is None else asked[0].listed.shape[1]
    whole = [
        _blank(size, count, named) if part is None else _wider(part, count)
        for part, size in zip(parts, sizes, strict=True)
    ]
    return Logprobs(
        chosen=torch.cat([part.chosen for part in whole]),
        ranks=torch.cat([part.ranks for part in whole]),
        ids=torch.cat([part.ids for part in whole]),
        values=torch.cat([part.values for part in whole]),
        listed=None
        if named is None
        else torch.cat([part.listed for part in whole if part.listed is not None]),
    )


def _blank(rows: int, count: int, named: int | None) -> Logprobs:
    return Logprobs(
        chosen=torch.full((rows,), math.nan),
        ranks=torch.full((rows,), -1, dtype=torch.int64),
        ids=torch.full((rows, count), -1, dtype=torch.int64),
        values=torch.full((rows, count), -math.inf),
        listed=None if named is None else torch.full((rows, named), -math.inf),
    )


def _wider(part: Logprobs, count: int) -> Logprobs:
    missing = (0, count - part.ids.shape[1])
    pad = torch.nn.functional.pad
    return replace(
        part, ids=pad(part.ids, missing, value=-1), values=pad(part.values, missing, value=-math.inf)
    )
