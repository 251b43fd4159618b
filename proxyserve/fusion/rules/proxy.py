"""Rule `proxy`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.program import BASE_LANE, Program, Term
from proxyserve.fusion.rule import Rule, check_experts
from proxyserve.fusion.weights import ExpertWeight


@dataclass(frozen=True, slots=True)
class Proxy(Rule):
    """`l_base + sum_i w_i (l_tuned_i - l_untuned_i)`: proxy-tuning (Liu et al. 2024, arXiv 2401.08565), with several
    experts the test-time mixing of emulated fine-tuning (Mitchell et al. 2024, arXiv 2310.12962).

    Without experts it is the base. A weight of 0 is allowed; that expert's lanes are not run.
    """

    name: ClassVar[str] = "proxy"

    experts: tuple[ExpertWeight, ...] = field(
        default=(), metadata={"description": "Weights or schedules of weights."}
    )

    def check(self) -> None:
        check_experts(self.experts)

    def compile(self, catalog: Catalog) -> Program:
        return Program(BASE_LANE, terms=tuple(delta_term(entry, catalog) for entry in self.experts))


def delta_term(entry: ExpertWeight, catalog: Catalog) -> Term:
    """`w (l_tuned - l_untuned)` of one expert."""
    tuned, untuned = catalog.pair(entry.expert)
    return Term(tuned, untuned, entry.weight, entry.schedule, f"fusion.experts.{entry.expert}", bounded=True)
