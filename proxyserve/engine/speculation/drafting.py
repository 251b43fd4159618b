"""The part of a step in which requests run ahead of their text.

        depth 0            depth 1            depth 2         the step's forwards
    drafter  last ─▶ a     a ─▶ b             b ─▶ c          c        one token per request and depth
    others                                                    last a b c

At each depth every drafting model has one forward with a token of each of its requests, and one pick draws the next
drafts of them all. A draft is drawn from the drafter's law just as the request's next token will be drawn from the
fused law: with the same noise, temperature, filters, penalties and masks. So the better the drafter knows the fused
law, the more often the two tokens are one, and whatever it drafts the text stays what it would have been.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from proxyserve.engine.adjustments import Adjuster, RowAdjustments
from proxyserve.engine.batch import FusedRow, Place, build_drawing, target_entropies
from proxyserve.engine.choice import Choice
from proxyserve.engine.cuda.step_graphs import StepGraphs
from proxyserve.engine.forward import run_models
from proxyserve.engine.residents import AnyRunner
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.scheduler.scheduler import LaneWork, Plan, Wish
from proxyserve.types import ModelKey
from proxyserve_kernels import Adjustments, Backend, RowBatch


@dataclass(slots=True)
class Drafted:
    """What drafting leaves behind. `rows` has, by choice, the adjustments of its text with 0, 1, … drafts, one more
    than there are drafts; choices that end here are left out. `places` says where in `sources` the logits of a
    drafter's tokens are, by the lane's id: of its last token, and of each draft but the last. `passes` is how many
    tokens a request's drafter ran, at times one more than there are drafts."""

    rows: dict[str, list[RowAdjustments]] = field(default_factory=dict)
    sources: list[Tensor] = field(default_factory=list)
    places: dict[int, list[Place]] = field(default_factory=dict)
    passes: dict[ScheduledRequest, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Runs:
    """A request that runs ahead; `proposed` are drafts that nobody needs to write."""

    choice: Choice
    wish: Wish
    proposed: Sequence[int]

    @property
    def trunk(self) -> ModelKey | None:
        return None if self.wish.drafter is None else self.wish.drafter.trunk

    @property
    def done(self) -> bool:
        return len(self.choice.scheduled.drafts) >= self.wish.drafts


def draft(
    plan: Plan,
    choices: Mapping[str, Choice],
    proposed: Mapping[ScheduledRequest, Sequence[int]],
    *,
    runners: Mapping[ModelKey, AnyRunner],
    backend: Backend,
    adjuster: Adjuster,
    graphs: StepGraphs | None = None,
) -> Drafted:
    """Write the drafts of the plan's granted requests. `proposed` has, for those without a drafter, at least as many
    tokens as were granted. Must be called in inference mode."""
    drafted = Drafted()
    runs = [
        _Runs(choices[request.request_id], wish, proposed.get(request, ()))
        for request, wish in plan.granted.items()
    ]
    # By forward, as the rows come; those without a drafter last.
    runs.sort(key=lambda run: (run.trunk is None, run.trunk or ()))
    runs = _rule(runs, adjuster, drafted)
    while runs:
        written = [run for run in runs if run.wish.drafter is not None]
        tokens = _write(written, drafted, runners, graphs, backend, adjuster) if written else []
        tokens.extend(run.proposed[len(run.choice.scheduled.drafts)] for run in runs[len(written) :])
        supposed = [
            run for run, token in zip(runs, tokens, strict=True) if _suppose(run, token, adjuster, drafted)
        ]
        runs = [run for run in _rule(supposed, adjuster, drafted) if not run.done]
    return drafted


def _rule(runs: Sequence[_Runs], adjuster: Adjuster, drafted: Drafted) -> list[_Runs]:
    """Find what may come after the drafts so far. Where that ends a request, its text will tell; here the draft is
    taken back that led there. Returns those that go on."""
    ruled, _ = adjuster.rule({run.choice.key: run.choice.adjustments for run in runs})
    going = []
    for run in runs:
        row = ruled.get(run.choice.key)
        if row is not None:
            drafted.rows.setdefault(run.choice.key, []).append(row)
            going.append(run)
        elif run.choice.scheduled.drafts:
            run.choice.adjustments.take_back(1)
    return going


def _suppose(run: _Runs, token: int, adjuster: Adjuster, drafted: Drafted) -> bool:
    """Take `token` as the next draft, unless it would be the last of the answer or cannot come at all: the row before
    it draws its own."""
    adjustments = run.choice.adjustments
    if token < 0 or token in adjustments.rules.ends:
        return False
    if run.wish.drafter is None:  # what is drawn can come
        row = drafted.rows[run.choice.key][-1]
        if token not in run.choice.vocabulary or not adjuster.allows(row, token):
            return False
    return adjustments.suppose(token) is None


def _write(
    runs: Sequence[_Runs],
    drafted: Drafted,
    runners: Mapping[ModelKey, AnyRunner],
    graphs: StepGraphs | None,
    backend: Backend,
    adjuster: Adjuster,
) -> list[int]:
    """One forward of each drafting model, and one pick. -1 where a drafter has no law."""
    work: dict[ModelKey, list[LaneWork]] = {}
    for run in runs:
        request, lane = run.choice.scheduled, run.wish.drafter
        assert lane is not None  # others write nothing
        item = LaneWork(request, lane, lane.wanted + len(request.drafts) - 1, 1, rows=1)
        work.setdefault(lane.trunk, []).append(item)
        drafted.passes[request] = drafted.passes.get(request, 0) + 1
    forward = run_models(runners, work, {}, graphs)
    sources = [forward.logits[trunk] for trunk in work]
    places = [(source, row) for source, items in enumerate(work.values()) for row in range(len(items))]
    for run, (source, row) in zip(runs, places, strict=True):
        place = len(drafted.sources) + source, row
        drafted.places.setdefault(id(run.wish.drafter), []).append(place)
    drafted.sources.extend(sources)
    return draw(
        backend,
        [FusedRow(run.choice, ahead=len(run.choice.scheduled.drafts)) for run in runs],
        sources,
        places,
        adjuster.adjustments([drafted.rows[run.choice.key][-1] for run in runs]),
    )


def draw(
    backend: Backend,
    rows: Sequence[FusedRow],
    sources: Sequence[Tensor],
    places: Sequence[Place],
    adjustments: Adjustments | None,
) -> list[int]:
    """A token for each row from one lane's law alone, found at its place in `sources`, drawn as the row draws from the
    fused law. -1 where there is no law."""
    none = torch.zeros(len(rows), 0, 2, dtype=torch.int64)
    batch = RowBatch(
        sources=tuple(sources),
        base=torch.tensor(places),
        widths=torch.tensor([row.choice.vocabulary.size for row in rows]),
        positive=none,
        negative=none,
        weights=torch.zeros(len(rows), 0),
    )
    entropies = target_entropies(rows)
    temperatures = None if entropies is None else backend.temperatures(batch, entropies).cpu()
    tokens: list[int] = backend.pick(batch, build_drawing(rows, temperatures, adjustments)).tokens.tolist()
    return tokens
