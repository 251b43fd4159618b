"""The sequence of launches that makes one pick. No allocation, no host value read back: it can be captured in a graph.

fuse_stats -> pick                                                           without filters and reports
    fuse_stats -> best_tokens -> search_last -> filter_blocks -> pick            with filters
    and best_tokens -> search_list, count_before for each law that is reported on; listed_logprobs after pick
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from proxyserve_kernels.triton_backend.device import layout, pick, select, stats
from proxyserve_kernels.triton_backend.table import RowTable
from proxyserve_kernels.triton_backend.tuning import (
    GROUP,
    LIST_OPTIONS,
    ROOM,
    ROW_OPTIONS,
    SEARCH_GROUP,
    TOGETHER,
    Tile,
    tile_for,
)

#: Lengths that lists of best tokens are rounded up to.
LISTS = (32, ROOM)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a batch needs beside tokens, fixed for a captured graph. `filters`: some row filters; `adjusts`: some row
    has bias, penalties or a mask; `scales`: some row has a temperature other than 1; `compares`: KL and flips are
    wanted; `raw`, `processed`: how many best tokens to list, None if no row asks at all. What the table's `listed` asks
    for follows from the table."""

    filters: bool = False
    adjusts: bool = False
    scales: bool = False
    compares: bool = True
    raw: int | None = None
    processed: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """Everything the kernels write, for `bucket` rows of at most `blocks` blocks. `reports` float32 [6, bucket] holds
    score and log-prob of the reported token under the raw and the processed law, and the two log-partitions."""

    stats: Tensor
    orders: Tensor
    candidates: Tensor
    thresholds: Tensor
    lasts: Tensor
    unsure: Tensor
    tokens: Tensor
    subjects: Tensor
    valid: Tensor
    flips: Tensor
    kl: Tensor
    removed: Tensor
    reports: Tensor
    raw_ids: Tensor
    raw_values: Tensor
    processed_ids: Tensor
    processed_values: Tensor
    raw_counts: Tensor
    processed_counts: Tensor
    listed: Tensor

    @classmethod
    def allocate(
        cls,
        bucket: int,
        blocks: int,
        wishes: Wishes,
        device: torch.device,
        room: int = ROOM,
        named: int = 0,
    ) -> Buffers:
        """Uninitialised: every kernel writes what a later one reads. `room`: places for best tokens, a power of two;
        `named`: how many tokens of each row the table lists. Raises ValueError if more of the likeliest are wished for
        than there is room."""
        if max(wishes.raw or 0, wishes.processed or 0) > room:
            raise ValueError(f"at most {room} of the likeliest tokens can be listed")

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        int64, int32 = torch.int64, torch.int32
        selecting = wishes.filters or bool(wishes.raw) or bool(wishes.processed)
        listed_raw, listed = list_size(wishes.raw), list_size(wishes.processed)
        return cls(
            stats=empty(layout.PLANES, bucket, blocks),
            orders=empty(bucket if selecting else 0, padded(blocks), dtype=int64),
            candidates=empty(bucket if selecting else 0, room, dtype=int64),
            thresholds=empty(bucket),
            lasts=empty(bucket, dtype=int64),
            unsure=empty(bucket, dtype=int32),
            tokens=empty(bucket, dtype=int64),
            subjects=empty(bucket, dtype=int64),
            valid=empty(bucket, dtype=torch.bool),
            flips=empty(bucket, dtype=torch.bool),
            kl=empty(bucket),
            removed=empty(bucket),
            # Whole multiples of 16 bytes, so that every row of it is aligned alike in every bucket.
            reports=empty(6, max(4, bucket))[:, :bucket],
            raw_ids=empty(bucket, listed_raw, dtype=int64),
            raw_values=empty(bucket, listed_raw),
            processed_ids=empty(bucket, listed, dtype=int64),
            processed_values=empty(bucket, listed),
            raw_counts=empty(bucket if wishes.raw is not None else 0, blocks, dtype=int32),
            processed_counts=empty(bucket if wishes.processed is not None else 0, blocks, dtype=int32),
            listed=empty(bucket, named),
        )


def padded(blocks: int) -> int:
    """Blocks of a row as the row programs see them: one number for all vocabularies up to 262,144, so that the order of
    their sums, and so a row's bits, do not depend on how wide its neighbours are, and one variant serves all batches;
    beyond, the next power of two."""
    return max(1024, 1 << (blocks - 1).bit_length())


def list_size(wanted: int | None) -> int:
    """Columns of a list of `wanted` tokens: one of `LISTS`, so that few variants are compiled; 0 for none."""
    return next(size for size in (0, *LISTS) if size >= (wanted or 0))


def launch_stats(table: RowTable, stats_out: Tensor, wishes: Wishes, tile: Tile | None = None) -> None:
    """K1 over the table."""
    tile = tile or tile_for(table.bucket, table.blocks)
    grid = (table.bucket, -(-table.blocks // tile.blocks))
    stats.fuse_stats[grid](
        table.ints, table.floats, stats_out, table.ints.stride(0), table.floats.stride(0),
        table.blocks, stats_out.stride(0),
        TILE=tile.blocks, ADJUST=wishes.adjusts, SCALED=wishes.scales, COMPARE=wishes.compares,
        **tile.options, **table.variant.constants(),
    )  # fmt: skip


def launch_pick(table: RowTable, buffers: Buffers, wishes: Wishes, tile: Tile | None = None) -> None:
    """All kernels of one pick, in order."""
    tile = tile or tile_for(table.bucket, table.blocks)
    grid = (table.bucket, -(-table.blocks // tile.blocks))
    strides = (table.ints.stride(0), table.floats.stride(0))
    plane = buffers.stats.stride(0)
    constants = {**table.variant.constants(), "ADJUST": wishes.adjusts}
    launch_stats(table, buffers.stats, wishes, tile)
    if wishes.raw:
        _select(table, buffers, layout.RAW.value, list_size(wishes.raw), constants)
    if wishes.filters or wishes.processed:
        _select(table, buffers, layout.PROCESSED.value, list_size(wishes.processed), constants)
    if wishes.filters:
        stats.filter_blocks[grid](
            table.ints, table.floats, buffers.stats, buffers.thresholds, buffers.lasts, *strides,
            table.blocks, plane, TILE=tile.blocks, **tile.options, **constants,
        )  # fmt: skip
    pick.pick[(table.bucket,)](
        table.ints, table.floats, buffers.stats, buffers.thresholds, buffers.lasts, buffers.tokens,
        buffers.valid, buffers.kl, buffers.flips, buffers.subjects, *buffers.reports.unbind(0), buffers.removed,
        *strides, table.blocks, plane, BLOCKS=padded(table.blocks), COMPARE=wishes.compares,
        **ROW_OPTIONS, **constants,
    )  # fmt: skip
    for law, wanted, scores, counts in (
        (layout.RAW.value, wishes.raw, buffers.reports[0], buffers.raw_counts),
        (layout.PROCESSED.value, wishes.processed, buffers.reports[2], buffers.processed_counts),
    ):
        if wanted is not None:
            stats.count_before[grid](
                table.ints, table.floats, buffers.subjects, scores, counts, *strides, table.blocks,
                LAW=law, TILE=tile.blocks, **tile.options, **constants,
            )  # fmt: skip
    if table.listed is not None:
        count = table.listed.shape[1]
        stats.listed_logprobs[(table.bucket, -(-count // TOGETHER))](
            table.ints, table.floats, buffers.reports[4], table.listed, buffers.listed, *strides, count,
            TOGETHER=TOGETHER, **LIST_OPTIONS, **table.variant.constants(),
        )  # fmt: skip


def _select(
    table: RowTable, buffers: Buffers, law: int, listed: int, constants: dict[str, int | bool]
) -> None:
    """Find the last kept tokens (of the processed law) and the lists of one law."""
    raw = law == layout.RAW.value
    ids = buffers.raw_ids if raw else buffers.processed_ids
    values = buffers.raw_values if raw else buffers.processed_values
    inputs = (table.ints, table.floats, buffers.stats, buffers.orders)
    sizes = (table.ints.stride(0), table.floats.stride(0), table.blocks, buffers.stats.stride(0))
    constants = {
        **constants,
        "BLOCKS": padded(table.blocks),
        **ROW_OPTIONS,
    }
    room = buffers.candidates.shape[1]
    select.best_tokens[(table.bucket,)](
        *inputs, buffers.candidates, buffers.thresholds, buffers.lasts, buffers.unsure, ids, values, *sizes,
        LAW=law, ROOM=room, LIST=listed, GROUP=GROUP, **constants,
    )  # fmt: skip
    if not raw:
        select.search_last[(table.bucket,)](
            *inputs,
            buffers.thresholds,
            buffers.lasts,
            buffers.unsure,
            *sizes,
            GROUP=SEARCH_GROUP,
            **constants,
        )
    if listed:
        select.search_list[(table.bucket,)](
            *inputs, buffers.candidates, buffers.unsure, ids, values, *sizes,
            LAW=law, ROOM=room, LIST=listed, GROUP=SEARCH_GROUP, **constants,
        )  # fmt: skip


def write_scores(table: RowTable) -> Tensor:
    """Fused scores written out, float32 [rows, width]."""
    tile = tile_for(table.bucket, table.blocks)
    out = torch.empty(table.bucket, table.width, dtype=torch.float32, device=table.ints.device)
    stats.write_scores[(table.bucket, -(-table.blocks // tile.blocks))](
        table.ints, table.floats, out, table.ints.stride(0), table.floats.stride(0), out.stride(0),
        TILE=tile.blocks, **tile.options, **table.variant.constants(),
    )  # fmt: skip
    return out[: table.rows]


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)
