"""What is known of one HTTP request: every layer that it passes adds to it, and at its end the log and the traces are
written from it. It never holds text of prompts or answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.types import Scope

from proxyserve.types import FinishReason, FusionReport, OutputEvent, SamplingParams, Timing, Usage

if TYPE_CHECKING:
    from proxyserve.engine.submission import Submission

#: What nginx logs for a client that left; nobody receives it.
CLIENT_CLOSED_REQUEST = 499

_BASE_LANE = "base"


@dataclass(slots=True)
class Work:
    """What a request had the engine do: what is known when it was queued, and what events of its choices brought.
    `generations` are those of its experts. `first_token_at` is by `time.perf_counter`, as the HTTP layer saw it."""

    rule: str
    sampling: SamplingParams
    choices: int
    generations: Mapping[str, int]
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_at: float | None = None
    finish_reasons: list[FinishReason] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    reports: list[tuple[int, FusionReport]] = field(default_factory=list)

    @classmethod
    def of(cls, submissions: Sequence[Submission], generations: Mapping[str, int]) -> Work:
        """Of submissions that are answered together, and are alike but for their prompts."""
        first = submissions[0]
        return cls(
            rule=first.fusion.rule.name,
            sampling=first.sampling,
            choices=first.n * len(submissions),
            generations=generations,
            prompt_tokens=sum(len(submission.prompts.of(_BASE_LANE)) for submission in submissions),
        )

    def with_more(self, work: Work) -> Work:
        """Both together, of which `work` has only been queued; events of either are added to this one."""
        self.choices += work.choices
        self.prompt_tokens += work.prompt_tokens
        return self

    def add(self, event: OutputEvent, *, counts_prompt: bool) -> None:
        """An event of one of the choices has come. `counts_prompt`: of those that continue its prompt, it is the one
        whose cached tokens count."""
        self.completion_tokens += len(event.token_ids)
        if event.token_ids and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        if event.finish_reason is not None:
            self.finish_reasons.append(event.finish_reason)
        if event.timing is not None:
            self.timings.append(event.timing)
        if event.usage is not None:
            self.usages.append(event.usage)
            self.cached_tokens += event.usage.cached_tokens if counts_prompt else 0
            if event.fusion is not None:
                self.reports.append((event.usage.completion_tokens, event.fusion))

    @property
    def timing(self) -> Timing | None:
        """Of all choices together: queued, admitted and begun with the first, ended with the last. None before all have
        ended."""
        if len(self.timings) < self.choices:
            return None
        admitted = [timing.admitted_at for timing in self.timings if timing.admitted_at is not None]
        begun = [timing.first_token_at for timing in self.timings if timing.first_token_at is not None]
        return Timing(
            queued_at=min(timing.queued_at for timing in self.timings),
            admitted_at=min(admitted, default=None),
            first_token_at=min(begun, default=None),
            finished_at=max(timing.finished_at for timing in self.timings),
            barrier_seconds=max(timing.barrier_seconds for timing in self.timings),
        )

    @property
    def lane_tokens(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for usage in self.usages:
            for model, count in usage.lane_tokens.items():
                total[model] = total.get(model, 0) + count
        return total

    @property
    def mean_kl(self) -> float | None:
        """Over generated positions; None where none was fused, or not with the base."""
        compared = [(tokens, report.mean_kl) for tokens, report in self.reports if report.mean_kl is not None]
        positions = sum(tokens for tokens, _ in compared)
        return sum(tokens * kl for tokens, kl in compared) / positions if positions else None

    @property
    def flips(self) -> int | None:
        flips = [report.flips for tokens, report in self.reports if tokens and report.flips is not None]
        return sum(flips) if flips else None

    @property
    def drafted(self) -> int | None:
        return sum(report.drafted or 0 for _, report in self.reports) or None

    @property
    def accepted(self) -> int | None:
        return sum(report.accepted or 0 for _, report in self.reports) if self.drafted else None


@dataclass(slots=True)
class RequestRecord:
    """`path` and `model` are as the client wrote them, `route` is the path of the route that took the request. `error`
    is the code of what it was told. `complete`: the whole answer was sent. Times are by `time.perf_counter`, but for
    `began`, which is in nanoseconds since the epoch."""

    request_id: str
    method: str
    path: str
    arrived: float = field(default_factory=time.perf_counter)
    began: int = field(default_factory=time.time_ns)
    ended: float = 0.0
    status: int | None = None
    error: str | None = None
    complete: bool = False
    route: str | None = None
    key: str = ""
    model: str | None = None
    stream: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    work: Work | None = None
    trace_id: str | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.arrived

    @property
    def disconnected(self) -> bool:
        """Whether the client left, or stopped reading, before it had everything."""
        return not self.complete or self.status == CLIENT_CLOSED_REQUEST

    @property
    def first_token_seconds(self) -> float | None:
        if self.work is None or self.work.first_token_at is None:
            return None
        return self.work.first_token_at - self.arrived

    def nanoseconds(self, moment: float) -> int:
        """A time by `time.perf_counter`, since the epoch."""
        return self.began + int((moment - self.arrived) * 1e9)

    def end(self, scope: Scope) -> None:
        """Nothing more will happen; take what the layers inside left in the scope."""
        self.ended = time.perf_counter()
        self.route = getattr(scope.get("route"), "path", None)
        caller = scope["state"].get("caller")
        self.key = "" if caller is None else caller.name


def record_of(scope: Scope) -> RequestRecord | None:
    """The record of the request with this scope; None without the middleware that makes them."""
    record: RequestRecord | None = scope.get("state", {}).get("record")
    return record


def note_error(scope: Scope, code: str | None) -> None:
    """The client is being told of an error with this code."""
    record = record_of(scope)
    if record is not None:
        record.error = code or "error"
