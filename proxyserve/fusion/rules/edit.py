"""Rule `edit`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.program import BASE_LANE, Program
from proxyserve.fusion.rule import Rule, number, only_expert
from proxyserve.fusion.rules.proxy import delta_term
from proxyserve.fusion.weights import ExpertWeight


@dataclass(frozen=True, slots=True)
class Edit(Rule):
    """`l_base + w (l_tuned - l_untuned)` with the largest calibrated `w` that keeps the loss on general text within
    `1 + budget` times the base's: model editing with canonical examples (Hewitt et al. 2024, arXiv 2402.06155).

    The losses come from `proxyserve calibrate`, given to the server with `--calibration`.
    """

    name: ClassVar[str] = "edit"

    experts: tuple[ExpertWeight, ...] = field(
        default=(), metadata={"description": "Exactly one, of weight 1."}
    )
    budget: float = number(0.01, 0.0, 10.0, "Relative rise of the loss on general text that is allowed.")

    def check(self) -> None:
        only_expert(self.name, self.experts, "its weight is found from 'budget'")

    def compile(self, catalog: Catalog) -> Program:
        entry = self.experts[0]
        term = delta_term(entry, catalog)
        calibration = catalog.calibrations.get(entry.expert)
        if calibration is None:
            raise InvalidRequest(
                f"Expert '{entry.expert}' has no calibration on this server. Run 'proxyserve calibrate' for it and "
                "start the server with --calibration FILE, or use rule 'proxy' with a weight of your own.",
                param=term.param,
            )
        return Program(BASE_LANE, terms=(replace(term, weight=calibration.largest_within(self.budget)),))
