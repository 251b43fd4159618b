"""The program that every rule compiles to: which lanes, added how, with which weights.

    scores = origin_weight * l(origin) + sum over terms of weight * (l(lane) - l(minus))

`l` is the log-softmax over the shared ids. Lanes go by name: `base`, `qa.tuned`, `qa.untuned`, each with `@VARIANT`
when it has a prompt of its own (`base@negative`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from proxyserve.fusion.weights import Schedule, factor_at

BASE_LANE = "base"

#: In `Support.of`: the fused law itself.
FUSED_LAW = "fused"

Match = Literal["both", "forward", "reverse", "budget", "paper"]


@dataclass(frozen=True, slots=True)
class Term:
    """`weight * (l(lane) - l(minus))`; without `minus` the lane's law alone. `param` is the field of the request that
    the weight comes from; `bounded` says that the server's range of weights applies to it."""

    lane: str
    minus: str | None
    weight: float
    schedule: Schedule = ()
    param: str = "fusion"
    bounded: bool = False

    @property
    def active(self) -> bool:
        """Whether it ever changes a score."""
        return self.weight != 0.0 and (not self.schedule or any(factor for _, factor in self.schedule))

    @property
    def extremes(self) -> tuple[float, float]:
        """The least and the largest weight that it ever has."""
        weights = [self.weight * factor for _, factor in self.schedule] or [self.weight]
        return min(weights), max(weights)

    def weight_at(self, token: int) -> float:
        """Its weight at generated token number `token`."""
        return self.weight * factor_at(self.schedule, token)


@dataclass(frozen=True, slots=True)
class SupportMask:
    """Keep tokens that are likely under at least one law of `of` (lane names, or FUSED_LAW): those that min-p, then
    top-k, then top-p leave of it. Outside, a token is removed ("mask") or has the origin's score alone ("base")."""

    of: tuple[str, ...]
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    outside: Literal["mask", "base"] = "mask"


@dataclass(frozen=True, slots=True)
class WeightLaw:
    """The terms' weights are a direction; how far to go along it is solved at each position from KL divergences.
    `kl` is in nats and used by "budget" alone. `proxyserve_kernels.tilt` has the formulas."""

    match: Match
    max_weight: float
    kl: float = 0.0


@dataclass(frozen=True, slots=True)
class Program:
    """`power` None is the sum above; else the power mean with that exponent of the origin and the terms (each a lane
    alone), their weights summing to 1. `one_sided`: a term's difference counts only where it is positive."""

    origin: str
    origin_weight: float = 1.0
    terms: tuple[Term, ...] = ()
    power: float | None = None
    one_sided: bool = False
    support: SupportMask | None = None
    law: WeightLaw | None = None

    def __post_init__(self) -> None:
        if self.power is not None and any(term.minus is not None for term in self.terms):
            raise ValueError("a power mean is of single lanes")
        if self.law is not None and (self.power is not None or self.one_sided or not self.terms):
            raise ValueError("weights are solved for plain sums that have a term")

    @property
    def active_terms(self) -> tuple[Term, ...]:
        """The terms that ever have a weight; the others cost nothing."""
        return tuple(term for term in self.terms if term.active)

    @property
    def lanes(self) -> tuple[str, ...]:
        """Names of the lanes that must run, the base first if it is among them."""
        names = dict.fromkeys(self._lane_names(self.active_terms))
        return tuple(sorted(names, key=lambda name: name != BASE_LANE))

    @property
    def idle_lanes(self) -> tuple[str, ...]:
        """Names of the lanes that it speaks of and that need not run, their weights being 0."""
        running = set(self.lanes)
        return tuple(name for name in dict.fromkeys(self._lane_names(self.terms)) if name not in running)

    def _lane_names(self, terms: tuple[Term, ...]) -> Iterator[str]:
        # An origin of weight 0 still runs: a token that it rules out stays out.
        yield self.origin
        for term in terms:
            yield term.lane
            if term.minus is not None:
                yield term.minus
        if self.support is not None:
            yield from (name for name in self.support.of if name != FUSED_LAW)

    @property
    def sum_of_weights(self) -> float:
        """Sum of all coefficients. 1 keeps the natural temperature; otherwise lanes that agree give their common law
        to that power."""
        return self.origin_weight + sum(term.weight_at(0) for term in self.terms if term.minus is None)

    @property
    def is_plain_sum(self) -> bool:
        """Whether it is nothing but a sum with fixed weights, so that it can be a part of another."""
        return (
            self.power is None
            and not self.one_sided
            and self.support is None
            and self.law is None
            and not any(term.schedule for term in self.terms)
        )

    def coefficients(self) -> dict[str, float]:
        """Of each lane in a plain sum; ValueError for other programs."""
        if not self.is_plain_sum:
            raise ValueError("only a plain sum is the sum of its coefficients")
        total = {self.origin: self.origin_weight}
        for term in self.terms:
            total[term.lane] = total.get(term.lane, 0.0) + term.weight
            if term.minus is not None:
                total[term.minus] = total.get(term.minus, 0.0) - term.weight
        return total

    def supported_by(self, support: SupportMask | None) -> Program:
        """The same program with another support."""
        return replace(self, support=support)

    def describe(self) -> str:
        """Its parts in words and formulas, a line each."""
        lines = [f"lanes    {', '.join(self.lanes)}"]
        if self.power is not None:
            parts = [(self.origin_weight, self.origin), *((term.weight, term.lane) for term in self.terms)]
            inside = ", ".join(f"{weight:g} p({lane})" for weight, lane in parts if weight)
            lines.append(f"scores   log of the power mean, r = {self.power:g}, of {inside}")
        else:
            lines.append(f"scores   {_weighted(self.origin_weight, f'l({self.origin})')}")
            for term in self.active_terms:
                lines.append("         " + _describe_term(term, one_sided=self.one_sided))
        if self.law is not None:
            budget = f", at most {self.law.kl:g} nats" if self.law.match == "budget" else ""
            lines.append(
                f"weights  times a factor solved per position: {self.law.match}{budget}, 0 to {self.law.max_weight:g}"
            )
        if self.support is not None:
            filters = [
                f"{name} {value:g}"
                for name, value, off in (
                    ("min_p", self.support.min_p, 0.0),
                    ("top_k", self.support.top_k, 0),
                    ("top_p", self.support.top_p, 1.0),
                )
                if value != off
            ]
            rest = "removed" if self.support.outside == "mask" else f"{self.origin} alone"
            lines.append(f"support  {', '.join(filters)} of {' or '.join(self.support.of)}; outside: {rest}")
        lines.append(f"sum of weights  {self.sum_of_weights:g}")
        return "\n".join(lines)


def _weighted(weight: float, what: str) -> str:
    return what if weight == 1.0 else f"{weight:g} * {what}"


def _describe_term(term: Term, *, one_sided: bool) -> str:
    sign, size = ("-", -term.weight) if term.weight < 0 else ("+", term.weight)
    difference = f"l({term.lane})" if term.minus is None else f"(l({term.lane}) - l({term.minus}))"
    if one_sided:
        difference = (
            f"max(0, {difference.strip('()')})" if term.minus is None else f"max(0, {difference[1:-1]})"
        )
    text = f"{sign} {_weighted(size, difference)}"
    if term.schedule:
        text += "  times " + ", ".join(f"{factor:g} from token {start}" for start, factor in term.schedule)
    return text
