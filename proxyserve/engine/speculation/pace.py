"""How many tokens each request drafts in a step.

A step with drafts takes longer and gives more. Drafts of all requests, the likeliest to stand first, are added one
after another to an imagined step, and where tokens per second are most the list is cut: that is how many each request
drafts. Which drafts pay therefore depends on how often each drafter is right, on what its forwards cost, on what more
tokens cost the models that verify, and on how many requests share all of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from proxyserve.engine.speculation.costs import ForwardCosts

#: Speculation must promise this many times the tokens per second of the plain step: estimates err.
PAYS = 1.05
#: Rates are rounded to so many steps in [0, 1], so that requests with about the same rate are one.
_STEPS = 16
#: Less likely drafts are not worth a thought.
_LEAST = 0.05


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that could draft at most `most` tokens, each of which stands with probability `rate` if those before it
    do. `drafter` names the forwards that draft; None if there are none (lookup). `verifiers` names the forwards of
    which each draft is one token more: a name as often as it has lanes there."""

    verifiers: tuple[Hashable, ...]
    rate: float
    most: int
    drafter: Hashable | None = None


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds: `forwards` by name and tokens; `picking` by rows, all that a step does beside its forwards; `drafting`
    by rows, the same for the part of a step that drafts at one depth, taken for another pick until it is known."""

    forwards: Mapping[Hashable, ForwardCosts]
    picking: ForwardCosts
    drafting: ForwardCosts


@dataclass(slots=True)
class _Step:
    """An imagined step: tokens of each forward, rows of the pick, and requests that draft at each depth by drafter."""

    costs: StepCosts
    tokens: Counter[Hashable]
    rows: int
    depths: list[Counter[Hashable]] = field(default_factory=list)

    def draft(self, candidate: Candidate, requests: int, depth: int) -> None:
        """Let so many requests like the candidate draft one token more, their token number `depth` from 0."""
        for name in candidate.verifiers:
            self.tokens[name] += requests
        self.rows += requests
        if candidate.drafter is not None:
            if depth == len(self.depths):
                self.depths.append(Counter())
            self.depths[depth][candidate.drafter] += requests

    def seconds(self) -> float:
        forwards, drafting = self.costs.forwards, self.costs.drafting
        if not drafting.known:
            drafting = self.costs.picking
        total = self.costs.picking.seconds(self.rows)
        total += sum(forwards[name].seconds(count) for name, count in self.tokens.items())
        for depth in self.depths:
            total += drafting.seconds(depth.total())
            total += sum(forwards[name].seconds(count) for name, count in depth.items())
        return total


def choose(
    candidates: Sequence[Candidate], costs: StepCosts, *, tokens: Mapping[Hashable, int], rows: int
) -> list[int]:
    """How many tokens each candidate drafts, at most its `most`. `tokens` has those of each forward of the step without
    drafts, and `rows` how many tokens that step draws, the candidates' included. Prompts that are processed in the same
    step are in neither: they would make a slow step look like one in which drafts are cheap. All zero if speculation
    does not promise to pay."""
    none = [0] * len(candidates)
    groups: dict[Candidate, list[int]] = {}
    for number, candidate in enumerate(candidates):
        rate = round(candidate.rate * _STEPS) / _STEPS
        if candidate.most > 0 and rate > 0.0:
            like = Candidate(candidate.verifiers, rate, candidate.most, candidate.drafter)
            groups.setdefault(like, []).append(number)
    drafts = sorted(
        (-(group.rate ** (depth + 1)), depth, number)
        for number, group in enumerate(groups)
        for depth in range(group.most)
    )
    step = _Step(costs, Counter(tokens), rows)
    known = list(groups.items())
    plain = step.seconds()
    if not 0.0 < plain < float("inf"):
        return none
    expected, best, cut = float(rows), PAYS * rows / plain, 0
    for place, (gain, depth, number) in enumerate(drafts, start=1):
        if -gain < _LEAST:
            break
        group, members = known[number]
        step.draft(group, len(members), depth)
        expected -= gain * len(members)
        if expected / step.seconds() > best:
            best, cut = expected / step.seconds(), place
    chosen = none
    for _, _, number in drafts[:cut]:
        for member in known[number][1]:
            chosen[member] += 1
    return chosen
