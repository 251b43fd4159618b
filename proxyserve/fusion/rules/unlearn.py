"""Rule `unlearn`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.program import BASE_LANE, Program, Term
from proxyserve.fusion.rule import Rule, number, only_expert
from proxyserve.fusion.weights import ExpertWeight


@dataclass(frozen=True, slots=True)
class Unlearn(Rule):
    """`l_base - alpha max(0, l_tuned - l_base)` (Eldan and Russinovich 2023, arXiv 2310.02238).

    The expert's tuned model is the reinforced one, trained further on what is to be forgotten; its untuned model takes
    no part. Scores only fall. The formula is not blind to constants, so both laws are normalised first.
    """

    name: ClassVar[str] = "unlearn"

    experts: tuple[ExpertWeight, ...] = field(
        default=(), metadata={"description": "Exactly one, of weight 1."}
    )
    alpha: float = number(5.0, 0.0, 100.0, "Multiplies what the reinforced model gained.")

    def check(self) -> None:
        only_expert(self.name, self.experts, "use 'alpha'")

    def compile(self, catalog: Catalog) -> Program:
        reinforced = catalog.tuned(self.experts[0].expert)
        gain = Term(reinforced, BASE_LANE, -self.alpha, param="fusion.alpha")
        return Program(BASE_LANE, terms=(gain,), one_sided=True)
