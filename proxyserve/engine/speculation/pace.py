"""How many tokens each request drafts in a step.

A step with drafts takes longer and gives more. Drafts of all requests, the likeliest to stand first, are added one
after another to an imagined step, and where tokens per second are most the list is cut: that is how many each request
drafts. Which drafts pay therefore depends on how often each drafter is right, on what its forwards cost, on what more
tokens cost the models that verify, and on how many requests share all of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from proxyserve.engine.speculation.step_costs import StepCosts
from proxyserve.types import ModelKey

#: Speculation must promise this many times the tokens per second of the plain step: estimates err.
PAYS = 1.05
#: Rates are rounded to so many steps in [0, 1], so that requests with about the same rate are one.
_STEPS = 16
#: Less likely drafts are not worth a thought.
_LEAST = 0.05
_PLENTY = 1 << 30


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that could draft at most `most` tokens, each of which stands with probability `rate` if those before it
    do. `drafter` names the model that drafts; None if none does (lookup). `verifiers` names the models for whose
    forwards each draft is one token more: a model as often as it has lanes."""

    verifiers: tuple[ModelKey, ...]
    rate: float
    most: int
    drafter: ModelKey | None = None

    @property
    def lanes(self) -> int:
        """Each of which has a row of logits for each draft."""
        return len(self.verifiers) + (self.drafter is not None)


@dataclass(slots=True)
class _Step:
    """An imagined step: tokens of each model, rows of the pick, and requests that draft at each depth by drafter.
    `logits` is how many rows of them drafts may still have, `most_tokens` how many tokens one model may have."""

    costs: StepCosts
    tokens: Counter[ModelKey]
    rows: int
    logits: int
    most_tokens: int
    depths: list[Counter[ModelKey]] = field(default_factory=list)

    def room(self, candidate: Candidate, requests: int) -> int:
        """For one token more of how many of so many requests like the candidate."""
        most = min(
            self.logits // candidate.lanes,
            *(
                (self.most_tokens - self.tokens[name]) // candidate.verifiers.count(name)
                for name in candidate.verifiers
            ),
        )
        return max(0, min(requests, most))

    def draft(self, candidate: Candidate, requests: int, depth: int) -> None:
        """Let so many requests like the candidate draft one token more, their token number `depth` from 0."""
        for name in candidate.verifiers:
            self.tokens[name] += requests
        self.rows += requests
        self.logits -= requests * candidate.lanes
        if candidate.drafter is not None:
            if depth == len(self.depths):
                self.depths.append(Counter())
            self.depths[depth][candidate.drafter] += requests

    def seconds(self) -> float:
        return self.costs.seconds(self.tokens, self.rows) + self.costs.drafting_seconds(self.depths)


def choose(
    candidates: Sequence[Candidate],
    costs: StepCosts,
    *,
    tokens: Mapping[ModelKey, int],
    rows: int,
    most_logits: int = _PLENTY,
    most_tokens: int = _PLENTY,
) -> list[int]:
    """How many tokens each candidate drafts, at most its `most`. `tokens` has those of each model in the step without
    drafts, and `rows` how many tokens that step draws, the candidates' included. Prompts that are processed in the same
    step are in neither: they would make a slow step look like one in which drafts are cheap. A step has room for
    `most_logits` rows of logits for drafts, over all lanes, and for `most_tokens` tokens of each model; where that is
    not enough, the likeliest drafts have it. All zero if speculation does not promise to pay."""
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
    step = _Step(costs, Counter(tokens), rows, most_logits, most_tokens)
    known = list(groups.items())
    plain = step.seconds()
    if not 0.0 < plain < float("inf"):
        return none
    expected, best, cut = float(rows), PAYS * rows / plain, 0
    added: list[Sequence[int]] = []
    for gain, depth, number in drafts:
        if -gain < _LEAST:
            break
        group, members = known[number]
        members = members[: step.room(group, len(members))]
        known[number] = group, members  # who has no room for this draft has none for the next
        if not members:
            continue
        step.draft(group, len(members), depth)
        added.append(members)
        expected -= gain * len(members)
        if expected / step.seconds() > best:
            best, cut = expected / step.seconds(), len(added)
    chosen = none
    for drafting in added[:cut]:
        for member in drafting:
            chosen[member] += 1
    return chosen
