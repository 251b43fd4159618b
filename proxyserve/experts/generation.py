"""The life of one generation of an expert, as a state machine.

    LOADING ─▶ VERIFYING ─▶ WARMING ─▶ PUBLISHED ─▶ DRAINING ─▶ STANDBY ─▶ RETIRED
     ▲ │           │           │         ▲    │      │   │        │          ▲
     │ └───────────┴───────────┴─▶FAILED └────┼──────┴───┼────────┘          │
     │ └───────────┴───────────┴─▶PARKED ◀────┘ rollback └───────────────────┤
     └─────────────────────────────┘ └───────────────────────────────────────┘

`PUBLISHED` is the one that new requests get; at most one generation of an expert is in it. A generation that another
one has replaced drains: what runs on it finishes. Then it stands by, weights in memory, for a rollback, until memory
is wanted or the expert is deleted. A parked generation is still the expert's, but its weights are on disk only; it is
loaded again when a request names it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class Phase(enum.StrEnum):
    """What a generation is doing."""

    LOADING = "loading"
    VERIFYING = "verifying"
    WARMING = "warming"
    PUBLISHED = "published"
    DRAINING = "draining"
    STANDBY = "standby"
    PARKED = "parked"
    RETIRED = "retired"
    FAILED = "failed"

    @property
    def is_loading(self) -> bool:
        """Whether work towards publishing goes on."""
        return self in (Phase.LOADING, Phase.VERIFYING, Phase.WARMING)

    @property
    def is_over(self) -> bool:
        """Whether nothing will ever happen to the generation again."""
        return not LEGAL_MOVES[self]


#: Nothing leaves RETIRED and FAILED. A parked generation that cannot be loaded again goes back to PARKED.
LEGAL_MOVES: Mapping[Phase, frozenset[Phase]] = {
    Phase.LOADING: frozenset({Phase.VERIFYING, Phase.FAILED, Phase.PARKED}),
    Phase.VERIFYING: frozenset({Phase.WARMING, Phase.FAILED, Phase.PARKED}),
    Phase.WARMING: frozenset({Phase.PUBLISHED, Phase.FAILED, Phase.PARKED}),
    Phase.PUBLISHED: frozenset({Phase.DRAINING, Phase.PARKED}),
    Phase.DRAINING: frozenset({Phase.STANDBY, Phase.PUBLISHED, Phase.RETIRED}),
    Phase.STANDBY: frozenset({Phase.PUBLISHED, Phase.RETIRED}),
    Phase.PARKED: frozenset({Phase.LOADING, Phase.RETIRED}),
    Phase.RETIRED: frozenset(),
    Phase.FAILED: frozenset(),
}


class IllegalMove(RuntimeError):
    """A generation was sent where none can go: a defect of the caller."""


def require_legal(before: Phase, after: Phase) -> None:
    """Raises IllegalMove."""
    if after not in LEGAL_MOVES[before]:
        raise IllegalMove(f"a generation cannot go from {before} to {after}")
