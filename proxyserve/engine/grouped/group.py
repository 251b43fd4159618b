"""Models that run in one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter

from torch import Tensor

from proxyserve.engine.grouped.shell import Seat, Shell
from proxyserve.engine.runner import Runner
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.scheduler import LaneWork
from proxyserve.types import ModelKey

#: A small model's forward takes as long with no token as so many tokens more would: 22 for 5M parameters, 8 for 15M.
_FIXED_TOKENS = 16


class Group:
    """Models that are alike, each with its own weights and blocks, in one arena. Members change between steps only."""

    def __init__(self, shell: Shell, most_tokens: int) -> None:
        """`most_tokens`: in steps in which a member has more, it is no faster together, and runs alone."""
        self.most_tokens = most_tokens
        self.forwards = 0
        self._shell = shell
        self._members: dict[ModelKey, tuple[Runner, int]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def seat(self, runner: Runner) -> Seat:
        """What `join` needs of a member to be. Any thread may ask. Raises NotAlike."""
        return self._shell.seat(runner.model.module)

    def join(self, runner: Runner, seat: Seat) -> None:
        self._members[runner.model.key] = (runner, self._shell.add(seat))
        runner.group = self

    def leave(self, runner: Runner) -> None:
        """Let go of its weights."""
        _, place = self._members.pop(runner.model.key)
        self._shell.remove(place)
        runner.group = None

    def takes(self, work: Sequence[LaneWork]) -> bool:
        """Whether a member with this work should run with others."""
        return sum(item.count for item in work) <= self.most_tokens

    def run(
        self,
        work: Mapping[ModelKey, Sequence[LaneWork]],
        differences: Mapping[ModelKey, Sequence[tuple[Lane, Lane]]],
    ) -> dict[ModelKey, Tensor]:
        """What `Runner.run` returns for each of these members. Must be called in inference mode."""
        started = perf_counter()
        members = {key: self._members[key] for key in work}
        first = next(iter(members.values()))[0]
        storage = first.storage
        if storage is None or any(runner.storage is not storage for runner, _ in members.values()):
            raise RuntimeError("a group's members need one KV storage")
        rows = {
            place: runner.pack(work[key], differences.get(key, ()))
            for key, (runner, place) in members.items()
        }
        spans = [span for row in rows.values() for span in row.spans]
        logits = self._shell.compute(rows, first.attention.plan(spans, storage))
        self.forwards += 1
        shares = {place: _FIXED_TOKENS + len(row.ids) for place, row in rows.items()}
        second = (perf_counter() - started) / sum(shares.values())
        for runner, place in members.values():
            runner.stats.ran(rows[place].rows, second * shares[place])
        return dict(zip(members, logits, strict=True))
