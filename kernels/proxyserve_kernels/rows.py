"""Row descriptors and the linear fusion of a mixed batch.

    scores[r] = base[base_rows[r]] + sum over terms of r:  weight * (positive row - negative row)

Each row of the batch has any number of terms, in tensors of different models, widths and dtypes. Proxy-tuning (Liu et
al. 2024, arXiv 2401.08565) is the case "positive = tuned, negative = untuned"; a row without terms is the base alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: A token that one model of a pair rules out (-inf) and the other does not moves the score by this much, not by
#: infinity: an infinite delta would turn a negative weight or an absent token into certainty or NaN.
CLIP = 50.0

#: Sampling works in blocks of this many tokens; the rows of `fuse` are padded to a multiple of it with -inf.
BLOCK = 256


@dataclass(frozen=True, slots=True, eq=False)
class DeltaGroup:
    """Terms whose positive rows lie in one tensor and whose negative rows lie in one tensor.

    `rows` [n] int64: batch row of each term (a row appears at most once per group); `weights` [n] float32;
    `positive` [*, width] with `positive_rows` [n] int64; `negative` likewise, or None for a term without one.
    """

    rows: Tensor
    weights: Tensor
    positive: Tensor
    positive_rows: Tensor
    negative: Tensor | None = None
    negative_rows: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.negative is None) != (self.negative_rows is None):
            raise ValueError("negative and negative_rows go together")


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """A batch of rows to fuse. `base` [*, width] any float dtype; `base_rows` [B] int64; `widths[r]` is the number of
    ids that all models of row r share: ids from there on score -inf. No width may exceed that of a tensor it reads."""

    base: Tensor
    base_rows: Tensor
    widths: Sequence[int]
    groups: Sequence[DeltaGroup] = ()

    def __post_init__(self) -> None:
        if len(self.widths) != self.base_rows.shape[0]:
            raise ValueError("one width per row is needed")

    @property
    def size(self) -> int:
        return len(self.widths)

    @property
    def width(self) -> int:
        """Columns of the fused scores: the widest row, rounded up to whole blocks."""
        return -(-max(self.widths) // BLOCK) * BLOCK


def fuse(batch: RowBatch) -> tuple[Tensor, Tensor]:
    """Fused scores and base scores, both float32 [B, batch.width], -inf outside each row's width.

    The difference positive - negative is formed first, in float32, so that what the two have in common cancels before
    it is rounded against the base. The two results are one tensor when no row has a term. A NaN in any input of a row
    stays NaN in that row only.
    """
    base = _take(batch.base, batch.base_rows, batch.width, batch.widths)
    if not batch.groups:
        return base, base
    fused = base.clone()
    for group in batch.groups:
        # Columns from a row's own width on are -inf in `fused` already; a finite delta there changes nothing.
        widths = [batch.widths[row] for row in group.rows.tolist()]
        delta = _delta(group, max(widths))
        delta.mul_(group.weights[:, None])
        view = fused[:, : delta.shape[1]]
        if group.rows.shape[0] == batch.size and _is_range(group.rows):
            view.add_(delta)
        else:
            view.index_add_(0, group.rows, delta)
    return fused, base


def _take(source: Tensor, rows: Tensor, width: int, widths: Sequence[int]) -> Tensor:
    """Rows of `source` as a new float32 [n, width] tensor, -inf from each row's own width on."""
    taken = torch.full((rows.shape[0], width), -math.inf, dtype=torch.float32, device=source.device)
    if len(set(widths)) == 1:
        taken[:, : widths[0]] = _rows(source, rows)[:, : widths[0]]
    else:
        for row, (index, own) in enumerate(zip(rows.tolist(), widths, strict=True)):
            taken[row, :own] = source[index, :own]
    return taken


def _delta(group: DeltaGroup, width: int) -> Tensor:
    """positive - negative, float32 [n, width], with the -inf policy of `CLIP`."""
    positive = _rows(group.positive, group.positive_rows)[:, :width].float()
    if group.negative is None or group.negative_rows is None:
        return positive.clone() if positive.data_ptr() == group.positive.data_ptr() else positive
    negative = _rows(group.negative, group.negative_rows)[:, :width].float()
    delta = positive - negative
    if not torch.isfinite(delta.sum()):
        lost = torch.isneginf(positive)
        gained = torch.isneginf(negative)
        delta = torch.where(lost, -CLIP, delta)
        delta = torch.where(gained, CLIP, delta)
        delta = torch.where(lost & gained, 0.0, delta)
    return delta


def _rows(source: Tensor, rows: Tensor) -> Tensor:
    """`source[rows]`, without a copy where the rows are all of them in order."""
    if rows.shape[0] == source.shape[0] and _is_range(rows):
        return source
    return source.index_select(0, rows)


def _is_range(rows: Tensor) -> bool:
    return rows.tolist() == list(range(rows.shape[0]))
