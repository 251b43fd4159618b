"""Rule `contrast`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.program import Program, SupportMask, Term
from proxyserve.fusion.rule import Rule, number, only_expert
from proxyserve.fusion.weights import ExpertWeight


@dataclass(frozen=True, slots=True)
class Contrast(Rule):
    """`l_tuned - gamma l_untuned` where `p_tuned >= alpha max p_tuned`, else -inf: contrastive generative exploration
    (Isonuma and Titov 2025, arXiv 2410.14765) and contrastive decoding (Li et al. 2022, arXiv 2210.15097).

    It shows what tuning added, so the base takes no part and is not run. The mask is what keeps tokens out that both
    models find unlikely; with `gamma` 1 the law is the bare ratio inside it.
    """

    name: ClassVar[str] = "contrast"

    experts: tuple[ExpertWeight, ...] = field(
        default=(), metadata={"description": "Exactly one, of weight 1."}
    )
    gamma: float = number(1.0, 0.0, 10.0, "Multiplies log p_untuned.")
    alpha: float = number(0.1, 0.0, 1.0, "Share of the tuned model's largest probability that a token needs.")

    def check(self) -> None:
        only_expert(self.name, self.experts, "use 'gamma'")

    def compile(self, catalog: Catalog) -> Program:
        tuned, untuned = catalog.pair(self.experts[0].expert)
        # The same sum with the difference formed first, so that what the two models share cancels unrounded.
        ratio = Term(tuned, untuned, self.gamma, param="fusion.gamma")
        plausible = SupportMask((tuned,), min_p=self.alpha) if self.alpha > 0.0 else None
        return Program(tuned, 1.0 - self.gamma, (ratio,), support=plausible)
