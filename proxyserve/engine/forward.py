"""All models' share of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from proxyserve.engine.cuda.step_graphs import StepGraphs
from proxyserve.engine.grouped.group import Group
from proxyserve.engine.remote_runner import RemoteRows, RemoteRunner
from proxyserve.engine.runner import Runner
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.scheduler import LaneWork
from proxyserve.types import ModelKey

#: Two lanes of one trunk: the first's logits minus the second's are wanted, and neither alone.
Pair = tuple[Lane, Lane]


@dataclass(frozen=True, slots=True)
class Forward:
    """`logits` [rows, width] of each trunk: the rows of each work item whose lane is in none of the `differences`, then
    as many for each of these pairs. `remote` has the rest of what is known about the rows of remote
    models. `failures` maps ids of requests to why one of their lanes has no logits."""

    logits: Mapping[ModelKey, Tensor]
    remote: Mapping[ModelKey, RemoteRows] = field(default_factory=dict)
    differences: Mapping[ModelKey, Sequence[Pair]] = field(default_factory=dict)

    @property
    def failures(self) -> dict[str, str]:
        return {request: reason for rows in self.remote.values() for request, reason in rows.failures.items()}


def run_models(
    runners: Mapping[ModelKey, Runner | RemoteRunner],
    work: Mapping[ModelKey, Sequence[LaneWork]],
    differences: Mapping[ModelKey, Sequence[Pair]],
    graphs: StepGraphs | None = None,
) -> Forward:
    """Run every model's work; each pair of lanes in `differences` has the rows of one. Remote models are asked first
    and listened to last, so that the local ones run while the answers are on their way. What is recorded in `graphs` is
    replayed. Of the others, those of a group that have work for it run in one forward, if there are two or more. Must
    be called in inference mode."""
    calls = {}
    for model, items in work.items():
        runner = runners[model]
        if isinstance(runner, RemoteRunner):
            calls[model] = runner.begin(items)
    logits: dict[ModelKey, Tensor] = {} if graphs is None else graphs.run(work, differences)
    groups: dict[Group, dict[ModelKey, Sequence[LaneWork]]] = {}
    for model, items in work.items():
        runner = runners[model]
        if model in logits or not isinstance(runner, Runner) or runner.group is None:
            continue
        if runner.group.takes(items):
            groups.setdefault(runner.group, {})[model] = items
    together = {group: members for group, members in groups.items() if len(members) > 1}
    for group, members in together.items():
        logits.update(group.run(members, differences))
    for model, items in work.items():
        runner = runners[model]
        if isinstance(runner, Runner) and model not in logits:
            logits[model] = runner.run(items, differences.get(model, ()))
    remote = {model: call.rows() for model, call in calls.items()}
    logits.update({model: rows.known for model, rows in remote.items()})
    return Forward(logits, remote, differences)
