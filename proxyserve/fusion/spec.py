"""The fusion object of a request, as plain self-checking types (no HTTP, no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from proxyserve.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """One expert and the real number that multiplies its delta."""

    expert: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.expert:
            raise InvalidRequest("An expert's name must not be empty.", param="fusion.experts")
        if not math.isfinite(self.weight):
            raise InvalidRequest(
                f"The weight of expert '{self.expert}' must be a finite number, not {self.weight}.",
                param=f"fusion.experts.{self.expert}",
            )


@dataclass(frozen=True, slots=True)
class Fusion:
    """Rule `proxy`: `l_base + sum_i w_i (l_tuned_i - l_untuned_i)` (Liu et al., 2024, arXiv 2401.08565).

    `l` is the log-softmax over the shared ids; the formula is linear, so raw logits give the same law. Experts are
    named once each; a weight of 0 is allowed and means that the expert's lanes are not run.
    """

    experts: tuple[ExpertWeight, ...] = ()
    rule: str = "proxy"

    def __post_init__(self) -> None:
        if self.rule != "proxy":
            raise InvalidRequest(
                f"Rule '{self.rule}' is not there yet; this version has rule 'proxy'.", param="fusion.rule"
            )
        seen: set[str] = set()
        for entry in self.experts:
            if entry.expert in seen:
                raise InvalidRequest(
                    f"Expert '{entry.expert}' is named twice; give each expert one weight.",
                    param="fusion.experts",
                )
            seen.add(entry.expert)

    @property
    def active(self) -> tuple[ExpertWeight, ...]:
        """The experts whose lanes run."""
        return tuple(entry for entry in self.experts if entry.weight != 0.0)

    @property
    def sum_of_weights(self) -> float:
        """Sum of the coefficients of all terms. 1 for `proxy`, since each delta is a difference."""
        return 1.0


@dataclass(frozen=True, slots=True)
class FusionPolicy:
    """What the server allows: the range of weights and how many experts one request may name."""

    min_weight: float = -4.0
    max_weight: float = 4.0
    max_experts: int = 8

    def __post_init__(self) -> None:
        if not self.min_weight <= 0.0 <= self.max_weight:
            raise ValueError("the allowed range of weights must contain 0")

    def check(self, fusion: Fusion) -> None:
        """Raise `InvalidRequest` if `fusion` is outside this policy."""
        if len(fusion.experts) > self.max_experts:
            raise InvalidRequest(
                f"{len(fusion.experts)} experts are named; this server allows {self.max_experts} per request.",
                param="fusion.experts",
            )
        for entry in fusion.experts:
            if not self.min_weight <= entry.weight <= self.max_weight:
                raise InvalidRequest(
                    f"The weight of expert '{entry.expert}' is {entry.weight:g}; "
                    f"this server allows {self.min_weight:g} to {self.max_weight:g}.",
                    param=f"fusion.experts.{entry.expert}",
                )
