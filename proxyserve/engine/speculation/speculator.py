"""Which requests run ahead of their text in the next step, how far, and by whose drafts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter

from proxyserve.config import EngineConfig, Speculate
from proxyserve.engine.adjustments import Adjuster, RowAdjustments
from proxyserve.engine.batch import FusedRow, LogitRows
from proxyserve.engine.choice import Choice, Sampled
from proxyserve.engine.residents import AnyRunner
from proxyserve.engine.runner import Runner
from proxyserve.engine.speculation.adaptive import Adaptive
from proxyserve.engine.speculation.ahead import Ahead
from proxyserve.engine.speculation.drafter import drafter_of, is_steady
from proxyserve.engine.speculation.drafting import Drafted, draw
from proxyserve.engine.speculation.lookup import Lookup
from proxyserve.models.remote import RemoteModel
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.scheduler.scheduler import Plan, Wish
from proxyserve.types import ModelKey
from proxyserve_kernels import Backend


class Speculator:
    """`base` is the trunk whose lanes never draft. `speculate` is what the configuration says, and may be changed
    between steps; requests that came while it was "off" never run ahead. `proposed` has the drafts of this step's
    wishes that were looked up."""

    def __init__(self, config: EngineConfig, base: ModelKey) -> None:
        self.speculate: Speculate = config.speculate
        self.proposed: Mapping[ScheduledRequest, list[int]] = {}
        self._base = base
        self._config = config
        self._adaptive = Adaptive(config)
        #: Seconds of this step that were spent on drafting and comparing.
        self._aside = 0.0

    def measure(self, runner: Runner) -> None:
        """Before any step: find out what the model's forwards cost. For one that has no storage yet."""
        if self.speculate == "auto":
            self._adaptive.measure(runner, self._config.max_batch * (1 + self._config.max_drafts))

    def begin(self, choice: Choice) -> None:
        """A new choice. Those that a gate or a remote model makes wait between tokens never run ahead."""
        if self.speculate == "off" or choice.is_gated or choice.max_output < 2:
            return
        if any(isinstance(spec.model, RemoteModel) for spec in choice.program.lanes):
            return
        ahead = Ahead(None, is_steady(choice), Lookup(choice.scheduled.lanes[0].prompt))
        choice.ahead = ahead
        self._find_drafter(choice, ahead)

    def _find_drafter(self, choice: Choice, ahead: Ahead) -> None:
        drafter = drafter_of(choice, self._base)
        if self.speculate == "auto" and (ahead.drafting is None or drafter is not ahead.drafter):
            ahead.drafting = self._adaptive.begin(choice, drafter)
        ahead.drafter = drafter

    # One step ------------------------------------------------------------------------------------------------

    def wishes(
        self, running: Iterable[Choice], runners: Mapping[ModelKey, AnyRunner]
    ) -> Mapping[ScheduledRequest, Wish]:
        """How far each of them would go if it only needs its next token. A draft is never the last token of an answer:
        the row before it draws that."""
        running = list(running)
        self._aside = 0.0
        proposed: dict[ScheduledRequest, list[int]] = {}
        most: dict[Choice, int] = {}
        for choice in running:
            ahead = choice.ahead
            if ahead is None:
                continue
            ahead.shadow, ahead.guess = False, None
            drafts = min(self._most, choice.max_output - len(choice.output) - 1)
            if drafts < 1:
                continue
            if not ahead.steady:
                self._find_drafter(choice, ahead)
            if ahead.drafter is None:
                found = ahead.lookup.propose(choice.output, drafts)
                proposed[choice.scheduled], drafts = found, len(found)
            if drafts:
                most[choice] = drafts
        self.proposed = proposed
        counts = self._pace(most, running, runners) if self.speculate == "auto" else most
        return {
            choice.scheduled: Wish(count, None if choice.ahead is None else choice.ahead.drafter)
            for choice, count in counts.items()
        }

    @property
    def _most(self) -> int:
        if self.speculate == "off":
            return 0
        return self._config.max_drafts if self.speculate == "auto" else self.speculate

    def _pace(
        self, most: Mapping[Choice, int], running: Sequence[Choice], runners: Mapping[ModelKey, AnyRunner]
    ) -> dict[Choice, int]:
        """As many drafts as pay; where none does, see whether they would stand."""
        self._adaptive.start(runners)
        counts = self._adaptive.drafts(most, running, runners)
        plain: list[tuple[Ahead, float]] = []
        for choice in most:
            ahead = choice.ahead
            if ahead is None or ahead.drafting is None or choice in counts:
                continue
            if ahead.drafter is None:
                ahead.guess = self.proposed[choice.scheduled][0]
            else:
                plain.append((ahead, ahead.drafting.due))
        # Comparing is mostly a price per step, so those that are soon due are compared along with those that are.
        if any(due >= 1.0 for _, due in plain):
            for ahead, due in plain:
                ahead.shadow = due >= 0.5
        return counts

    def drafted(
        self, plan: Plan, drafted: Drafted, seconds: float, runners: Mapping[ModelKey, AnyRunner]
    ) -> None:
        """The plan's granted requests have their drafts, which took so long."""
        self._aside += seconds
        if self.speculate != "auto":
            return
        depths: list[dict[ModelKey, int]] = []
        for request, passes in drafted.passes.items():
            drafter = plan.granted[request].drafter
            assert drafter is not None  # without one nothing is passed through
            depths += ({} for _ in range(passes - len(depths)))
            for depth in depths[:passes]:
                depth[drafter.trunk] = depth.get(drafter.trunk, 0) + 1
        self._adaptive.drafted(depths, seconds, runners)

    def compare(
        self,
        rows: Sequence[FusedRow],
        adjusted: Sequence[RowAdjustments],
        sampled: Sequence[object],
        logits: LogitRows,
        backend: Backend,
        adjuster: Adjuster,
    ) -> None:
        """Of requests without drafts in this step: would the drafter's token have been the one that was drawn?
        `sampled` are the results of the rows, whose requests still have their drafts."""
        asked: list[tuple[FusedRow, RowAdjustments, Ahead, int]] = []
        for row, adjustments, result in zip(rows, adjusted, sampled, strict=True):
            ahead = row.choice.ahead
            if ahead is None or ahead.drafting is None or row.choice.scheduled.drafts:
                continue
            if not isinstance(result, Sampled):
                continue
            if ahead.guess is not None:
                ahead.drafting.shadowed(ahead.guess == result.token)
            elif ahead.shadow:
                asked.append((row, adjustments, ahead, result.token))
            elif ahead.drafter is not None:
                ahead.drafting.skipped()
        if not asked:
            return
        started = perf_counter()
        places = [
            logits.place(ahead.drafter, row.nth) for row, _, ahead, _ in asked if ahead.drafter is not None
        ]
        changes = adjuster.adjustments([adjustments for _, adjustments, _, _ in asked])
        tokens = draw(backend, [row for row, _, _, _ in asked], logits.sources, places, changes)
        for (_, _, ahead, right), token in zip(asked, tokens, strict=True):
            if ahead.drafting is not None:
                ahead.drafting.shadowed(token == right)
        self._aside += perf_counter() - started

    def verified(self, choice: Choice, drafted: int, accepted: int) -> None:
        """Of so many drafts of a choice the first `accepted` stand."""
        if choice.ahead is not None and choice.ahead.drafting is not None and drafted:
            choice.ahead.drafting.verified(accepted, drafted)

    def stepped(self, plan: Plan, seconds: float, runners: Mapping[ModelKey, AnyRunner]) -> None:
        """The step has taken so long, all in all."""
        if self.speculate == "auto":
            self._adaptive.stepped(plan, seconds - self._aside, runners)
