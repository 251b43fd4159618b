"""Rule `upscale`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.program import BASE_LANE, Program, SupportMask, Term
from proxyserve.fusion.rule import Rule, number, only_expert
from proxyserve.fusion.weights import ExpertWeight


@dataclass(frozen=True, slots=True)
class Upscale(Rule):
    """`l_tuned + 1[x in N] beta (l_base - l_untuned)`: emulated fine-tuning (Mitchell et al. 2024, arXiv 2310.12962),
    the small tuned model lifted by what scale adds.

    `N` is the nucleus of the tuned model: the fewest most likely tokens that hold at least `top_p` of its mass. Outside
    it the ratio base / untuned counts as 1, so that a token the tuned model hardly believes in cannot win by a large
    ratio. `beta` above 1 amplifies. With `beta` 1 and `top_p` 1 the law is that of `proxy` at weight 1.
    """

    name: ClassVar[str] = "upscale"

    experts: tuple[ExpertWeight, ...] = field(
        default=(), metadata={"description": "Exactly one, of weight 1."}
    )
    beta: float = number(1.0, 0.0, 10.0, "Multiplies log p_base - log p_untuned.")
    top_p: float = number(
        1.0, 0.0, 1.0, "Mass of the tuned model's nucleus inside which the ratio counts; above 0."
    )

    def check(self) -> None:
        only_expert(self.name, self.experts, "use 'beta'")
        if self.top_p == 0.0:
            raise InvalidRequest("'top_p' must be above 0 and at most 1.", param="fusion.top_p")

    def compile(self, catalog: Catalog) -> Program:
        tuned, untuned = catalog.pair(self.experts[0].expert)
        lift = Term(BASE_LANE, untuned, self.beta, param="fusion.beta")
        nucleus = SupportMask((tuned,), top_p=self.top_p, outside="base") if self.top_p < 1.0 else None
        return Program(tuned, terms=(lift,), support=nucleus)
