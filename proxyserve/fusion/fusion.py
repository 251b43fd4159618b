"""The fusion object of a request: a rule, and what stands beside every rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.lane_prompt import LanePrompt
from proxyserve.fusion.program import FUSED_LAW, Program, SupportMask
from proxyserve.fusion.rule import Rule, check_number
from proxyserve.fusion.rules.proxy import Proxy
from proxyserve.fusion.weights import ExpertWeight

#: Most laws that a support may be the union of; the kernels have no room for more.
MAX_SUPPORT_LAWS = 4


@dataclass(frozen=True, slots=True)
class Support:
    """Which tokens stay possible: those that at least one of the laws `of` finds likely. `of` names lanes, "base",
    "tuned" (the tuned lane of every expert of the request) or "fused"; likely is what `min_p` (share of the law's
    largest probability), then `top_k`, then `top_p` leave. Outside, a token is removed ("mask") or keeps the score it
    has without any delta ("base")."""

    of: tuple[str, ...]
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    outside: Literal["mask", "base"] = "mask"

    def __post_init__(self) -> None:
        if not self.of:
            raise InvalidRequest("'support.of' must name at least one law.", param="fusion.support.of")
        if self.top_p is None and self.top_k is None and self.min_p is None:
            raise InvalidRequest(
                "A support needs 'top_p', 'top_k' or 'min_p' to say what is likely.", param="fusion.support"
            )
        check_number("support.min_p", self.min_p, 0.0, 1.0)
        check_number("support.top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("'support.top_p' must be above 0.", param="fusion.support.top_p")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidRequest("'support.top_k' must be at least 1.", param="fusion.support.top_k")

    def compile(self, program: Program, catalog: Catalog) -> SupportMask:
        """As a mask over the lanes of `program`. Raises UnknownModel or InvalidRequest."""
        laws: dict[str, None] = {}
        for name in self.of:
            if name == FUSED_LAW:
                laws[FUSED_LAW] = None
            elif name == "tuned":
                tuned = [lane for lane in program.lanes if lane.partition("@")[0].endswith(".tuned")]
                if not tuned:
                    raise InvalidRequest(
                        "'support.of' names 'tuned', and the request has no expert whose tuned model runs.",
                        param="fusion.support.of",
                    )
                laws.update(dict.fromkeys(tuned))
            else:
                laws[catalog.lane(name, "fusion.support.of")] = None
        if len(laws) > MAX_SUPPORT_LAWS:
            raise InvalidRequest(
                f"'support.of' names {len(laws)} laws; at most {MAX_SUPPORT_LAWS} are allowed.",
                param="fusion.support.of",
            )
        return SupportMask(tuple(laws), self.top_k or 0, self.top_p or 1.0, self.min_p or 0.0, self.outside)


@dataclass(frozen=True, slots=True)
class Gate:
    """Where the base alone gives some token at least the probability `confidence`, its law is used as it is and the
    other lanes are not run; they catch up when they are next needed. With a rule that does not use the base (a
    `mixture` of one tuned model) it is nudging (Fei et al. 2025, arXiv 2410.09300), token by token."""

    confidence: float

    def __post_init__(self) -> None:
        check_number("gate.confidence", self.confidence, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Fusion:
    """What a request asks for. `target_entropy`, in nats: the temperature is solved at each position so that the fused
    law has that entropy. `explain` k > 0: report what each lane thought of each token, with its k most likely ones.
    `prompts`: lanes (by name) that are prompted in a way of their own."""

    rule: Rule = field(default_factory=Proxy)
    support: Support | None = None
    target_entropy: float | None = None
    gate: Gate | None = None
    explain: int = 0
    prompts: Mapping[str, LanePrompt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("target_entropy", self.target_entropy, 0.0, math.inf)
        if self.explain < 0:
            raise InvalidRequest("'explain' must be 0 (off) or a number of tokens.", param="fusion.explain")

    @property
    def is_base(self) -> bool:
        """Whether it asks for the base as it is."""
        return isinstance(self.rule, Proxy) and not self.rule.experts and self.support is None

    @property
    def is_bare(self) -> bool:
        """Whether nothing that changes the law stands beside the rule."""
        return self.support is None and self.target_entropy is None and self.gate is None and not self.prompts

    def compile(self, catalog: Catalog) -> Program:
        """Rule and support as a program. Raises UnknownModel or InvalidRequest with the field at fault."""
        program = self.rule.compile(catalog)
        if self.support is not None:
            if program.support is not None:
                raise InvalidRequest(
                    f"Rule '{self.rule.name}' has a support of its own; leave 'support' out, or change the rule's "
                    "parameters.",
                    param="fusion.support",
                )
            if program.power is not None and self.support.outside == "base":
                raise InvalidRequest(
                    f"Rule '{self.rule.name}' has no score without its other models; use 'outside': 'mask'.",
                    param="fusion.support.outside",
                )
            program = program.supported_by(self.support.compile(program, catalog))
        return program

    def lane_prompts(self) -> Mapping[str, LanePrompt]:
        """Prompts of lanes that have their own, by the rule or by the request (which wins)."""
        return {**self.rule.prompts(), **self.prompts}


def proxy(weights: Mapping[str, float]) -> Fusion:
    """Rule `proxy` with these experts and nothing else."""
    return Fusion(Proxy(tuple(ExpertWeight(name, weight) for name, weight in weights.items())))
