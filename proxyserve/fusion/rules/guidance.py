"""Rule `guidance`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.lane_prompt import LanePrompt
from proxyserve.fusion.program import BASE_LANE, Program, Term
from proxyserve.fusion.rule import Rule, number, optional

NEGATIVE_LANE = f"{BASE_LANE}@negative"


@dataclass(frozen=True, slots=True)
class Guidance(Rule):
    """`l_neg + scale (l_pos - l_neg)`, both the base, on the request's prompt and on a negative one: classifier-free
    guidance (Sanchez et al. 2023, arXiv 2306.17806).

    Context-aware decoding (Shi et al. 2023, arXiv 2305.14739), `(1 + a) l(context, x) - a l(x)`, is the case where the
    negative prompt is the prompt without its context and `scale` is `1 + a`. At scale 1 it is the plain prompt, and the
    negative one is not run.
    """

    name: ClassVar[str] = "guidance"

    scale: float = number(1.5, 0.0, 20.0, "1 is the plain prompt; above, away from the negative one.")
    negative_prompt: str | tuple[int, ...] | None = optional("Text, or token ids.")
    negative_messages: tuple[dict[str, Any], ...] | None = optional(
        "A conversation, rendered as the lane's prompt."
    )

    def check(self) -> None:
        if (not self.negative_prompt) == (not self.negative_messages):
            raise InvalidRequest(
                "Rule 'guidance' needs 'negative_prompt' or 'negative_messages', one of them and not empty.",
                param="fusion.negative_prompt",
            )

    def compile(self, catalog: Catalog) -> Program:
        # The same sum on top of the positive prompt: nothing is left of it at scale 1.
        return Program(
            BASE_LANE, terms=(Term(BASE_LANE, NEGATIVE_LANE, self.scale - 1.0, param="fusion.scale"),)
        )

    def prompts(self) -> Mapping[str, LanePrompt]:
        if isinstance(self.negative_prompt, str):
            return {NEGATIVE_LANE: LanePrompt(text=self.negative_prompt)}
        if self.negative_prompt is not None:
            return {NEGATIVE_LANE: LanePrompt(tokens=self.negative_prompt)}
        return {NEGATIVE_LANE: LanePrompt(messages=self.negative_messages)}
