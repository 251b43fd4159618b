"""Which lane of a request drafts its tokens."""

from __future__ import annotations

from proxyserve.engine.choice import Choice
from proxyserve.scheduler.lane import Lane
from proxyserve.types import ModelKey


def drafter_of(choice: Choice, base: ModelKey) -> Lane | None:
    """The lane of a small model, one that does not run over `base`, that counts most in the scores of the next token:
    what it finds likely the fused law is likeliest to find likely as well. None if there is no such lane, or nothing
    beside it that would run less often."""
    program, lanes = choice.program, choice.scheduled.lanes
    if len(lanes) == 1:
        return None
    weights = {program.origin: program.program.origin_weight}
    number = len(choice.output)
    for term in program.terms:
        weight = term.weight_at(number)
        weights[term.lane] = weights.get(term.lane, 0.0) + weight
        if term.minus is not None:
            weights[term.minus] = weights.get(term.minus, 0.0) - weight
    small = [lane for lane in weights if lanes[lane].trunk != base]
    return lanes[max(small, key=weights.__getitem__)] if small else None


def is_steady(choice: Choice) -> bool:
    """Whether the same lane drafts all along: no weight has a schedule."""
    return not any(term.schedule for term in choice.program.terms)
