"""What the scheduler knows of a request: its lanes, its state, its place in the queue."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from proxyserve.scheduler.lane import Lane


class RequestState(enum.Enum):
    """WAITING holds no blocks; RUNNING holds blocks in every pool its lanes need; FINISHED holds none, for ever."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


#: Admission, preemption, and the end from either state. Nothing leaves FINISHED.
LEGAL_MOVES: dict[RequestState, frozenset[RequestState]] = {
    RequestState.WAITING: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.WAITING, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False)
class ScheduledRequest:
    """One choice of one submission: up to k lanes and one suffix of generated ids.

    `leader` is the first choice of the same prompt: a request waits for its leader's prompt so that it can share those
    blocks instead of computing them again. `arrival` orders requests; the scheduler sets it. `caller` is on whose
    behalf it is, of whose requests at most `max_running` run at once, and `priority` its class (`queue` has the law).

    `drafts` are unverified tokens that follow `output` during a step, for its lanes to run; empty between steps.

    `unscored` is how many rows of logits are wanted beside the one to sample from: those of the tokens just before the
    last, to see how likely the end of the prompt is. The scheduler counts it down.

    A `gated` request first computes lane 0 alone, to see whether the others are needed for the next token. While it is
    `awaiting`, they are: its owner holds the logits of lane 0, and the other lanes catch up. Its prompt is scored by
    all lanes at once.
    """

    request_id: str
    lanes: tuple[Lane, ...]
    output: list[int]
    drafts: list[int] = field(default_factory=list, init=False)
    leader: ScheduledRequest | None = None
    unscored: int = 0
    gated: bool = False
    awaiting: bool = False
    caller: str = ""
    priority: int = 0
    max_running: int | None = None
    arrival: int = -1
    preemptions: int = 0
    state: RequestState = field(default=RequestState.WAITING)

    def __post_init__(self) -> None:
        if not self.lanes:
            raise ValueError("a request needs at least one lane")
        if any(lane.output is not self.output for lane in self.lanes):
            raise ValueError("all lanes of a request share its one output list")
        if any(lane.wanted < self.rows for lane in self.lanes):
            raise ValueError("a lane has fewer tokens than the request wants rows of")
        for lane in self.lanes:
            lane.drafts = self.drafts

    def move(self, state: RequestState) -> None:
        if state not in LEGAL_MOVES[self.state]:
            raise ValueError(f"request {self.request_id} cannot go from {self.state.value} to {state.value}")
        self.state = state

    @property
    def rows(self) -> int:
        """How many tokens at the end of each lane are left whose logits are wanted."""
        return self.unscored + 1

    @property
    def turn(self) -> tuple[Lane, ...]:
        """The lanes that must catch up before anything can be done with their logits."""
        if not self.gated or self.unscored:
            return self.lanes
        return self.lanes[1:] if self.awaiting else self.lanes[:1]

    @property
    def prompt_computed(self) -> bool:
        """Whether every lane that is sure to run has its whole prompt in blocks, up to the last token (run when
        sampling)."""
        lanes = self.lanes[:1] if self.gated else self.lanes
        return all(lane.computed >= len(lane.prompt) - 1 for lane in lanes)
