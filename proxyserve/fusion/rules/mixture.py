"""Rule `mixture`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.program import Program, Term
from proxyserve.fusion.rule import Rule, check_number

#: How far from 1 the weights may sum, for numbers such as 0.33.
_SLACK = 1e-3

#: log of the mean of exp(r l) divides by r what float32 has rounded.
SMALLEST_EXPONENT = 0.01


@dataclass(frozen=True, slots=True)
class Mixture(Rule):
    """`(1/r) log sum_m w_m exp(r l_m)`, the power mean of the named models' laws, then renormalised.

    `r` 1 is the mixture (ensembles; Memory Decoder), 0 the product (weighted sum of log-probs, reverse-KL MOD), -1 the
    forward-KL form of MOD (Shi et al. 2024, arXiv 2406.18853), "inf" the union and "-inf" the intersection of
    language-model arithmetic (Dekoninck et al. 2024, arXiv 2311.14479). Models are lanes: `base`, `EXPERT.tuned`,
    `EXPERT.untuned`, or an untuned model's own name; a model of weight 0 is not run.
    """

    name: ClassVar[str] = "mixture"

    models: Mapping[str, float] = field(
        default_factory=dict, metadata={"description": "Lanes and their weights, which sum to 1."}
    )
    r: float | Literal["inf", "-inf"] = field(
        default=1.0,
        metadata={"description": "Exponent of the mean: 0, 0.01 to 100 in size, 'inf' or '-inf'."},
    )

    def check(self) -> None:
        if not isinstance(self.r, str):
            check_number("r", self.r, -100.0, 100.0)
            if 0.0 < abs(self.r) < SMALLEST_EXPONENT:
                raise InvalidRequest(
                    f"'r' must be 0 or at least {SMALLEST_EXPONENT:g} away from it; nearer, float32 loses the law.",
                    param="fusion.r",
                )
        for name, weight in self.models.items():
            if not math.isfinite(weight) or weight < 0.0:
                raise InvalidRequest(
                    f"The weight of '{name}' must be 0 or more, not {weight:g}.",
                    param=f"fusion.models.{name}",
                )
        total = sum(self.models.values())
        if abs(total - 1.0) > _SLACK:
            raise InvalidRequest(
                f"The weights of 'models' must sum to 1, not {total:g}.", param="fusion.models"
            )

    def compile(self, catalog: Catalog) -> Program:
        weights: dict[str, float] = {}
        for name, weight in self.models.items():
            lane = catalog.lane(name, f"fusion.models.{name}")
            if lane in weights:
                raise InvalidRequest(f"'{name}' names a model twice.", param=f"fusion.models.{name}")
            weights[lane] = weight
        total = sum(weights.values())
        (origin, first), *others = (
            (lane, weight / total) for lane, weight in weights.items() if weight > 0.0
        )
        terms = tuple(Term(lane, None, weight, param="fusion.models") for lane, weight in others)
        return Program(origin, first, terms, power=float(self.r))
