"""Rounds of one load as figures: the median of the rounds, and how far apart they were."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from proxyserve.bench.load.answer import Answer
from proxyserve.bench.load.drive import Load, Round

#: Which shares of the requests are below the figures that are given.
QUANTILES = (0.5, 0.9, 0.99)

#: Above these the generator is a part of what it measures: its share of a core, seconds that it comes late.
MOST_CPU = 0.5
MOST_LATE = 0.02


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of `values` is, interpolated between neighbours; NaN of no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Figure:
    """The same thing measured in each round; NaN in a round that had nothing to measure. `median`, `low` and `high` are
    those of the other rounds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self._measured)

    @property
    def low(self) -> float:
        return min(self._measured)

    @property
    def high(self) -> float:
        return max(self._measured)

    @property
    def _measured(self) -> Sequence[float]:
        return [value for value in self.rounds if not math.isnan(value)] or [math.nan]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: null."""
        return {
            "median": _finite(self.median),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "rounds": [_finite(value) for value in self.rounds],
        }


# What is timed, in seconds, of an answer.


def _first(answer: Answer) -> Iterator[float]:
    yield answer.pieces[0] - answer.began


def _gaps(answer: Answer) -> Iterator[float]:
    for before, after in pairwise(answer.pieces):
        yield after - before


def _per_token(answer: Answer) -> Iterator[float]:
    if answer.tokens > 1 and len(answer.pieces) > 1:
        yield (answer.pieces[-1] - answer.pieces[0]) / (answer.tokens - 1)


def _whole(answer: Answer) -> Iterator[float]:
    yield answer.ended - answer.began


#: By name. `gap` is between two pieces of text, of which one may hold several tokens; `per_token` is the time from the
#: first piece to the last, divided by the tokens after the first.
TIMES: dict[str, Callable[[Answer], Iterator[float]]] = {
    "ttft": _first,
    "gap": _gaps,
    "per_token": _per_token,
    "whole": _whole,
}


@dataclass(frozen=True, slots=True)
class Summary:
    """All rounds of one load. `times` are quantiles of a round's answers, by kind and quantile."""

    load: Load
    tokens_per_second: Figure
    requests_per_second: Figure
    times: dict[str, dict[float, Figure]]
    answered: int
    errors: dict[str, int]
    messages: dict[str, str]
    doubts: dict[str, int]
    cpu_share: Figure
    cpu_per_token: Figure
    lag: Figure
    late: Figure

    @property
    def troubles(self) -> list[str]:
        """Why these figures may not be those of the server."""
        found = [f"{count} x {kind}" for kind, count in {**self.errors, **self.doubts}.items()]
        if self.cpu_share.median > MOST_CPU:
            found.append(f"the generator itself used {self.cpu_share.median:.0%} of a core")
        if self.lag.median > MOST_LATE:
            found.append(f"the generator woke up {self.lag.median * 1e3:.0f} ms late (p99)")
        if self.late.median > MOST_LATE:
            found.append(
                f"arrivals were sent {self.late.median * 1e3:.0f} ms late (p99): it could not keep up"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "load": {
                "clients": self.load.clients,
                "rate": self.load.rate,
                "requests": self.load.requests,
            },
            "tokens_per_second": self.tokens_per_second.as_dict(),
            "requests_per_second": self.requests_per_second.as_dict(),
            "seconds": {
                kind: {f"p{share * 100:g}": figure.as_dict() for share, figure in figures.items()}
                for kind, figures in self.times.items()
            },
            "answered": self.answered,
            "errors": {
                kind: {"count": count, "first": self.messages[kind]} for kind, count in self.errors.items()
            },
            "doubts": self.doubts,
            "generator": {
                "cpu_share": self.cpu_share.as_dict(),
                "cpu_seconds_per_token": self.cpu_per_token.as_dict(),
                "lag_p99": self.lag.as_dict(),
                "late_p99": self.late.as_dict(),
            },
        }


def summarize(load: Load, rounds: Sequence[Round]) -> Summary:
    """At least one round."""

    def figure(of: Callable[[Round], float]) -> Figure:
        return Figure(tuple(of(one) for one in rounds))

    def times(kind: str, share: float) -> Figure:
        return figure(
            lambda one: quantile([time for answer in one.answers for time in TIMES[kind](answer)], share)
        )

    failures = [failure for one in rounds for failure in one.failures]
    answers = [answer for one in rounds for answer in one.answers]
    return Summary(
        load=load,
        tokens_per_second=figure(lambda one: one.tokens / one.seconds),
        requests_per_second=figure(lambda one: len(one.answers) / one.seconds),
        times={kind: {share: times(kind, share) for share in QUANTILES} for kind in TIMES},
        answered=len(answers),
        errors=dict(Counter(failure.kind for failure in failures)),
        messages={failure.kind: failure.message for failure in reversed(failures)},
        doubts=dict(Counter(doubt for answer in answers for doubt in answer.doubts)),
        cpu_share=figure(lambda one: one.cpu / one.seconds),
        cpu_per_token=figure(lambda one: one.cpu / one.tokens if one.tokens else math.nan),
        lag=figure(lambda one: quantile(one.lag, 0.99)),
        late=figure(lambda one: quantile(one.late, 0.99)),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
