"""One model's share of a step, as one row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from proxyserve.engine.adapters import AdapterBank, AdapterPlan
from proxyserve.engine.attention import Span
from proxyserve.engine.heads import HeadRows
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.scheduler import LaneWork


@dataclass(frozen=True, slots=True)
class PackedRow:
    """`ids` and `positions` of all tokens, `spans` of them with where their KV lies, `wanted` places of those that
    need logits. `heads` says what goes through the head in their stead, `adapters` which tokens have one."""

    ids: list[int]
    positions: list[int]
    spans: list[Span]
    wanted: list[int]
    heads: HeadRows | None = None
    adapters: AdapterPlan | None = None

    @classmethod
    def of(
        cls,
        work: Sequence[LaneWork],
        differences: Sequence[tuple[Lane, Lane]],
        adapters: AdapterBank,
        device: torch.device,
    ) -> PackedRow:
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        wanted: list[int] = []
        rows_of: dict[int, range] = {}  # by lane, places in `wanted`
        for item in work:
            stop = item.start + item.count
            ids.extend(item.lane.tokens(item.start, stop))
            positions.extend(range(item.start, stop))
            spans.append(Span(item.lane.blocks, item.start, item.count))
            rows_of[id(item.lane)] = range(len(wanted), len(wanted) + item.rows)
            wanted.extend(range(len(ids) - item.rows, len(ids)))
        return cls(
            ids,
            positions,
            spans,
            wanted,
            _head_rows(rows_of, differences, device) if differences else None,
            adapters.plan(
                [item.lane.model if item.lane.model in adapters else None for item in work],
                [item.count for item in work],
            ),
        )

    @property
    def rows(self) -> int:
        """Of logits."""
        return len(self.wanted) if self.heads is None else len(self.heads.plain) + len(self.heads.plus)


def _head_rows(
    rows_of: dict[int, range], differences: Sequence[tuple[Lane, Lane]], device: torch.device
) -> HeadRows:
    pairs = [
        pair
        for plus, minus in differences
        for pair in zip(rows_of[id(plus)], rows_of[id(minus)], strict=True)
    ]
    paired = {row for pair in pairs for row in pair}
    every = (row for rows in rows_of.values() for row in rows)
    return HeadRows.of([row for row in every if row not in paired], pairs, device)
