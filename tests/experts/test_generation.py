"""The moves of a generation are exactly those that are drawn and described in generation.py."""

from __future__ import annotations

import itertools

import pytest

from proxyserve.experts.generation import LEGAL_MOVES, IllegalMove, Phase, require_legal

ARROWS = {
    # To the first publishing, or the next one of a parked generation.
    ("loading", "verifying"),
    ("verifying", "warming"),
    ("warming", "published"),
    # What goes wrong on the way ends a new generation and leaves a parked one parked.
    ("loading", "failed"),
    ("verifying", "failed"),
    ("warming", "failed"),
    ("loading", "parked"),
    ("verifying", "parked"),
    ("warming", "parked"),
    # Out of service: replaced, or without memory.
    ("published", "draining"),
    ("draining", "standby"),
    ("published", "parked"),
    ("parked", "loading"),
    # Rollbacks.
    ("draining", "published"),
    ("standby", "published"),
    # The end.
    ("draining", "retired"),
    ("standby", "retired"),
    ("parked", "retired"),
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)))
def test_exactly_the_drawn_moves_are_legal(before: Phase, after: Phase) -> None:
    if (before.value, after.value) in ARROWS:
        require_legal(before, after)
    else:
        with pytest.raises(IllegalMove, match=f"cannot go from {before.value} to {after.value}"):
            require_legal(before, after)


def test_every_phase_has_its_moves() -> None:
    assert set(LEGAL_MOVES) == set(Phase)


def test_nothing_happens_to_what_is_retired_or_has_failed() -> None:
    assert {phase.value for phase in Phase if phase.is_over} == {"retired", "failed"}


def test_loading_lasts_until_publishing() -> None:
    assert {phase.value for phase in Phase if phase.is_loading} == {"loading", "verifying", "warming"}


def reachable(start: Phase) -> set[Phase]:
    found = {start}
    while more := {after for before in found for after in LEGAL_MOVES[before]} - found:
        found |= more
    return found


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_is_reached_and_can_come_to_an_end(phase: Phase) -> None:
    assert phase in reachable(Phase.LOADING)
    assert any(end.is_over for end in reachable(phase))


@pytest.mark.parametrize("phase", [phase for phase in Phase if not phase.is_loading and not phase.is_over])
def test_what_has_been_published_may_serve_again(phase: Phase) -> None:
    assert Phase.PUBLISHED in reachable(phase)
