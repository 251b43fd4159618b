"""Rule `dynamic`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.program import BASE_LANE, Program, WeightLaw
from proxyserve.fusion.rule import Rule, check_experts, optional
from proxyserve.fusion.rules.proxy import delta_term
from proxyserve.fusion.weights import ExpertWeight

#: The published grid ends here, and so do the other modes unless the request says otherwise.
DEFAULT_MAX_WEIGHT = 2.0

#: Modes in which every expert counts as much as it needs to, so that a weight would say nothing.
_UNWEIGHTED = ("exact", "paper")


@dataclass(frozen=True, slots=True)
class Dynamic(Rule):
    """`l_base + sum_i a_i (l_tuned_i - l_untuned_i)` with `a` solved at every position: dynamic logit fusion (Fan et
    al. 2024, arXiv 2406.15480). The fused law moves as far from the base as tuned moved from untuned:

        match "forward"  KL(fused || base) = KL(tuned || untuned)
        match "reverse"  KL(base || fused) = KL(untuned || tuned)
        match "both"     the least sum of the squares of both mismatches, the published objective

    Modes: "exact" solves that for one expert. "ray" goes along the direction of the given weights, whose targets are
    means of the experts' divergences weighted by |weight|. "budget" takes the largest `a` with
    KL(fused || base) <= `kl` nats. "paper" is the published search: 0.0, 0.1 .. 2.0, one expert at a time, the others
    0.
    """

    name: ClassVar[str] = "dynamic"

    experts: tuple[ExpertWeight, ...] = field(
        default=(),
        metadata={"description": "One or more; for several their weights are the direction (not in paper)."},
    )
    mode: Literal["exact", "ray", "budget", "paper"] | None = optional(
        "Default: exact for one expert, ray for several."
    )
    match: Literal["both", "forward", "reverse"] | None = optional(
        "Which divergences to match in modes exact and ray; default both."
    )
    max_weight: float | None = optional("Largest multiplier; default 2. Not in mode paper.", 1e-3, 100.0)
    kl: float | None = optional("Nats that mode budget may spend at each position.", 0.0, 100.0)

    def check(self) -> None:
        check_experts(self.experts)
        if not self.experts:
            raise InvalidRequest("Rule 'dynamic' needs at least one expert.", param="fusion.experts")
        mode = self.resolved_mode
        if mode == "exact" and len(self.experts) > 1:
            raise InvalidRequest(
                f"Mode 'exact' is for one expert, not {len(self.experts)}; use mode 'ray'.",
                param="fusion.mode",
            )
        for entry in self.experts:
            self._check_weight(mode, entry)
        if self.match is not None and mode not in ("exact", "ray"):
            raise InvalidRequest(
                f"'match' has no meaning in mode '{mode}'; leave it out.", param="fusion.match"
            )
        if self.max_weight is not None and mode == "paper":
            raise InvalidRequest(
                "Mode 'paper' always searches to 2.0; leave 'max_weight' out.", param="fusion.max_weight"
            )
        if (self.kl is not None) != (mode == "budget"):
            raise InvalidRequest(
                "Mode 'budget' needs 'kl', the nats it may spend."
                if mode == "budget"
                else f"'kl' has no meaning in mode '{mode}'; use mode 'budget', or leave it out.",
                param="fusion.kl",
            )

    def _check_weight(self, mode: str, entry: ExpertWeight) -> None:
        where = f"fusion.experts.{entry.expert}"
        if entry.schedule:
            raise InvalidRequest(
                "Rule 'dynamic' solves the weights; give no schedule.", param=f"{where}.schedule"
            )
        if mode in _UNWEIGHTED and entry.weight != 1.0:
            raise InvalidRequest(
                f"Mode '{mode}' solves the weight of '{entry.expert}'; give it the weight 1, or use mode 'ray' for a "
                "direction and 'max_weight' for a bound.",
                param=where,
            )
        if entry.weight <= 0.0:
            raise InvalidRequest(
                f"The weight of '{entry.expert}' is part of a direction and must be above 0.", param=where
            )

    @property
    def resolved_mode(self) -> str:
        """`mode`, or what it is by default."""
        return self.mode or ("exact" if len(self.experts) == 1 else "ray")

    def compile(self, catalog: Catalog) -> Program:
        mode = self.resolved_mode
        limit = DEFAULT_MAX_WEIGHT if self.max_weight is None else self.max_weight
        if mode == "budget":
            law = WeightLaw("budget", limit, self.kl or 0.0)
        elif mode == "paper":
            law = WeightLaw("paper", DEFAULT_MAX_WEIGHT)
        else:
            law = WeightLaw(self.match or "both", limit)
        return Program(BASE_LANE, terms=tuple(delta_term(entry, catalog) for entry in self.experts), law=law)
