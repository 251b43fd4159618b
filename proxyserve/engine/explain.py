"""What each lane thought of the chosen tokens, for the requests that want to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from proxyserve.engine.batch import FusedRow, LogitRows
from proxyserve.engine.choice import Sampled
from proxyserve.fusion.binding import BoundProgram
from proxyserve.types import LaneView, TokenExplanation, TokenLogprob
from proxyserve_kernels import Backend, PickControls, Ref, Row, RowBatch


@dataclass(frozen=True, slots=True)
class _Asked:
    """One lane of one request: `number` counts the requests, `lane` the request's lanes."""

    number: int
    lane: int


def explain(
    backend: Backend,
    rows: Sequence[FusedRow],
    logits: LogitRows,
    sampled: Sequence[Sampled],
    fused: Sequence[TokenLogprob | None],
) -> list[TokenExplanation | None]:
    """An entry per row, None for those that did not ask. One more call of the kernels over the lanes as they are; none
    if nobody asked. `fused` lists the likeliest tokens of the fused law, at least as many as are to be explained."""
    asked = [
        _Asked(number, lane)
        for number, row in enumerate(rows)
        if row.choice.submission.fusion.explain
        for lane in range(1 if row.alone else len(row.choice.scheduled.lanes))
    ]
    if not asked:
        return [None] * len(rows)
    views = _views(backend, asked, rows, logits, sampled)
    found: list[TokenExplanation | None] = [None] * len(rows)
    for number in dict.fromkeys(entry.number for entry in asked):
        own = {entry.lane: view for entry, view in zip(asked, views, strict=True) if entry.number == number}
        law = fused[number]
        if law is not None:
            found[number] = _explanation(rows[number], own, sampled[number], law)
    return found


def _views(
    backend: Backend,
    asked: Sequence[_Asked],
    rows: Sequence[FusedRow],
    logits: LogitRows,
    sampled: Sequence[Sampled],
) -> list[LaneView]:
    own = [rows[entry.number] for entry in asked]
    lanes = [row.choice.scheduled.lanes[entry.lane] for entry, row in zip(asked, own, strict=True)]
    batch = RowBatch.of(
        logits.sources,
        [
            Row(Ref(*logits.place(lane, row.nth)), row.choice.vocabulary.size)
            for lane, row in zip(lanes, own, strict=True)
        ],
    )
    wanted = [row.choice.submission.fusion.explain for row in own]
    controls = replace(
        PickControls.greedy(len(asked)),
        raw=wanted,
        forced=torch.tensor([sampled[entry.number].token for entry in asked]),
        compare=False,
    )
    laws = backend.pick(batch, controls).raw
    assert laws is not None  # every row asked
    chosen, ids, values = laws.chosen.tolist(), laws.ids.tolist(), laws.values.tolist()
    return [
        _view(chosen[row], list(zip(ids[row], values[row], strict=True)), count)
        for row, count in enumerate(wanted)
    ]


def _view(chosen: float, listed: Sequence[tuple[int, float]], count: int) -> LaneView:
    return LaneView(chosen, tuple(pair for pair in listed[:count] if pair[0] >= 0))


def _explanation(
    row: FusedRow, views: dict[int, LaneView], sampled: Sampled, fused: TokenLogprob
) -> TokenExplanation:
    program = row.choice.program
    lanes = {name: views[lane] for name, lane in program.lane_of.items() if lane in views}
    weights: dict[str, float] = {}
    push: dict[str, float] = {}
    if not row.alone:
        logprobs = {lane: view.logprob for lane, view in views.items()}
        weights, push = program.by_expert(sampled.weights, logprobs)
    compared = _is_compared(program, alone=row.alone)
    return TokenExplanation(
        token_id=sampled.token,
        fused=_view(fused.logprob, fused.top, row.choice.submission.fusion.explain),
        lanes=lanes,
        weights=weights,
        push=push,
        kl=sampled.kl if compared else None,
        flip=sampled.flip if compared else None,
        gated=row.alone,
    )


def _is_compared(program: BoundProgram, *, alone: bool) -> bool:
    """Whether KL and flips were taken against the base."""
    return alone or program.base is not None
