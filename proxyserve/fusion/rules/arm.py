"""Rule `arm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.program import BASE_LANE, Program, Term
from proxyserve.fusion.rule import Rule, check_experts
from proxyserve.fusion.weights import ExpertWeight


@dataclass(frozen=True, slots=True)
class Arm(Rule):
    """`l_base + sum_i w_i l_tuned_i`, without untuned models: autoregressive reward models (GenARM, Xu et al. 2025,
    arXiv 2410.08193), where `w` is 1 / beta.

    The weights sum to more than 1, which sharpens the law; the answer reports the sum.
    """

    name: ClassVar[str] = "arm"

    experts: tuple[ExpertWeight, ...] = field(
        default=(), metadata={"description": "Weights or schedules of weights."}
    )

    def check(self) -> None:
        check_experts(self.experts)
        if not self.experts:
            raise InvalidRequest("Rule 'arm' needs at least one expert.", param="fusion.experts")

    def compile(self, catalog: Catalog) -> Program:
        return Program(BASE_LANE, terms=tuple(self._term(entry, catalog) for entry in self.experts))

    @staticmethod
    def _term(entry: ExpertWeight, catalog: Catalog) -> Term:
        lane = catalog.tuned(entry.expert)
        return Term(lane, None, entry.weight, entry.schedule, f"fusion.experts.{entry.expert}", bounded=True)
