"""As many drafts as pay: what each step takes and which drafts stand is noticed, and the next step goes by it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from proxyserve.config import EngineConfig
from proxyserve.engine.arena import Layout
from proxyserve.engine.choice import Choice
from proxyserve.engine.residents import AnyRunner
from proxyserve.engine.runner import Runner
from proxyserve.engine.speculation.acceptance import Drafting, Kinds
from proxyserve.engine.speculation.pace import Candidate, choose
from proxyserve.engine.speculation.start_up import measure_forwards
from proxyserve.engine.speculation.step_costs import StepCosts
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.scheduler import Plan
from proxyserve.types import ModelKey


class Adaptive:
    """What is known about the speed of steps and about drafters. `start` comes first in each step, then `drafts`, if
    anything was drafted `drafted`, and at its end `stepped`; `runners` are those of the step, by trunk."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._kinds = Kinds()
        #: As measured at start-up, by what forwards of two models must have in common to take the same time.
        self._measured: dict[tuple[Layout, int], Mapping[int, float]] = {}
        self._costs = StepCosts()
        self._spent: dict[ModelKey, float] = {}

    def measure(self, runner: Runner, most: int) -> None:
        """At start-up: find out what forwards of up to `most` tokens take, if no model like this one is known."""
        if _likeness(runner) not in self._measured:
            self._measured[_likeness(runner)] = measure_forwards(runner, most)

    def begin(self, choice: Choice, drafter: Lane | None) -> Drafting:
        """What is known of a request's drafter: of that model under that rule, or of lookup."""
        fusion, sampling = choice.submission.fusion, choice.submission.sampling
        model = None if drafter is None else drafter.model
        return self._kinds.begin((model, fusion.rule.name, sampling.temperature > 0.0))

    # One step ------------------------------------------------------------------------------------------------

    def start(self, runners: Mapping[ModelKey, AnyRunner]) -> None:
        self._spent = _spent(runners)

    def drafts(
        self,
        most: Mapping[Choice, int],
        running: Iterable[Choice],
        runners: Mapping[ModelKey, AnyRunner],
    ) -> dict[Choice, int]:
        """How many tokens to draft for each choice of `most`, which says how many it could at most. Those of them count
        that need nothing but their next token; others are in the step, or not, at no matter what speed."""
        tokens: Counter[ModelKey] = Counter()
        candidates: dict[Choice, Candidate] = {}
        rows = 0
        for choice in running:
            lanes = choice.scheduled.turn
            if any(lane.missing != 1 for lane in lanes):
                continue
            rows += 1
            tokens.update(lane.trunk for lane in lanes if isinstance(runners[lane.trunk], Runner))
            ahead = choice.ahead
            if ahead is not None and ahead.drafting is not None and choice in most:
                candidates[choice] = Candidate(
                    tuple(lane.trunk for lane in lanes if lane is not ahead.drafter),
                    ahead.drafting.rate or 0.0,
                    most[choice],
                    None if ahead.drafter is None else ahead.drafter.trunk,
                )
        self._know(tokens, runners)
        chosen = choose(
            list(candidates.values()),
            self._costs,
            tokens=tokens,
            rows=rows,
            most_logits=self._config.max_scored_rows,
            most_tokens=self._config.max_batch_tokens,
        )
        return {choice: count for choice, count in zip(candidates, chosen, strict=True) if count}

    def drafted(
        self, depths: Sequence[Mapping[ModelKey, int]], seconds: float, runners: Mapping[ModelKey, AnyRunner]
    ) -> None:
        """Drafting took so long; `depths` are the tokens of each model at each depth."""
        spent = self._lap(runners, {trunk for depth in depths for trunk in depth})
        if depths:
            self._costs.drafting_took(seconds, depths, spent)

    def stepped(self, plan: Plan, seconds: float, runners: Mapping[ModelKey, AnyRunner]) -> None:
        """The step has taken so long, beside its drafting. Of steps with prompts, with newcomers or with models that
        are elsewhere nothing can be learned for others."""
        usual = all(
            isinstance(runners[trunk], Runner)
            and all(item.count == 1 or item.request in plan.granted for item in work)
            for trunk, work in plan.work.items()
        )
        if not usual or plan.admitted or plan.preempted:
            return
        spent = self._lap(runners, plan.work)
        if not all(trunk in self._costs.forwards for trunk in plan.work):
            return
        tokens = {trunk: sum(item.count for item in work) for trunk, work in plan.work.items()}
        self._costs.took(seconds, tokens, spent, sum(plan.rows.values()))

    def _lap(
        self, runners: Mapping[ModelKey, AnyRunner], trunks: Collection[ModelKey]
    ) -> dict[ModelKey, float] | None:
        """Seconds of forwards since the last call or the step's start. None where clocks do not tell: a forward returns
        before its device is done, or two generations of a model took part, which are counted together."""
        now, before = _spent(runners), self._spent
        self._spent = now
        spent: dict[ModelKey, float] = {trunk: now[trunk] - before[trunk] for trunk in trunks}
        together = len({trunk.name for trunk in trunks}) < len(spent)
        return None if together or any(returns_early(runners[trunk]) for trunk in trunks) else spent

    def _know(self, trunks: Iterable[ModelKey], runners: Mapping[ModelKey, AnyRunner]) -> None:
        """Have an idea of what these models cost."""
        known = self._costs.forwards
        if all(trunk in known for trunk in trunks):
            return
        for gone in [trunk for trunk in known if trunk not in runners]:
            self._costs.forget(gone)
        for trunk in trunks:
            runner = runners[trunk]
            if trunk not in known and isinstance(runner, Runner):
                self._costs.know(trunk, self._expected(runner))

    def _expected(self, runner: Runner) -> Mapping[int, float]:
        """What a model like this one was measured to cost; for one that came later and is like none, what the one that
        is closest in size would at this size."""
        if not self._measured:
            return {}
        layout, size = _likeness(runner)
        if (layout, size) in self._measured:
            return self._measured[layout, size]
        closest = min(self._measured, key=lambda known: abs(math.log(known[1] / size)))
        return {count: seconds * size / closest[1] for count, seconds in self._measured[closest].items()}


def _likeness(runner: Runner) -> tuple[Layout, int]:
    return runner.layout, runner.model.bytes


def returns_early(runner: AnyRunner) -> bool:
    """Whether its forwards go on after they have returned, until somebody looks at their logits."""
    return isinstance(runner, Runner) and runner.model.device.type == "cuda"


def _spent(runners: Mapping[ModelKey, AnyRunner]) -> dict[ModelKey, float]:
    """Seconds of forwards so far."""
    return {trunk: runner.stats.seconds for trunk, runner in runners.items()}
