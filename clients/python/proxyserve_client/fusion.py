"""What a request asks of fusion, as objects that check themselves before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

#: How a lane gets a chat: through a chat template, or as the messages' text alone.
PromptForm = Literal["chat", "plain"]


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """One expert and the real number that multiplies its delta. Raises ValueError for an empty name or a weight that
    is not finite; which finite weights are allowed is the server's policy."""

    expert: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.expert:
            raise ValueError("an expert's name must not be empty")
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of expert '{self.expert}' must be finite, not {self.weight}")


@dataclass(frozen=True, slots=True)
class Fusion:
    """The `fusion` object of a request. Rule `proxy`: `base + sum of weight * (tuned - untuned)`.

    `prompts` is for chats only and says, per lane (`base`, `EXPERT.tuned`, `EXPERT.untuned`), in which form that lane
    gets the messages. Lanes that it does not name get the server's choice.
    """

    experts: tuple[ExpertWeight, ...] = ()
    rule: Literal["proxy"] = "proxy"
    prompts: Mapping[str, PromptForm] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [entry.expert for entry in self.experts]
        if len(set(names)) < len(names):
            raise ValueError(f"each expert has one weight, but these are named: {', '.join(names)}")
        object.__setattr__(self, "prompts", MappingProxyType(dict(self.prompts)))

    @classmethod
    def proxy(cls, weights: Mapping[str, float] | None = None, /, **more_weights: float) -> Fusion:
        """`Fusion.proxy(qa=0.8, record=1.0)`. Names that are not Python names go in a mapping:
        `Fusion.proxy({"qa-v2": 0.8})`."""
        entries = [*(weights or {}).items(), *more_weights.items()]
        return cls(tuple(ExpertWeight(name, weight) for name, weight in entries))

    def with_prompts(self, prompts: Mapping[str, PromptForm]) -> Fusion:
        """The same fusion with other prompt forms: `.with_prompts({"base": "plain"})`."""
        return Fusion(self.experts, self.rule, prompts)

    def to_dict(self) -> dict[str, Any]:
        """The value of the field `fusion` in a request's JSON."""
        body: dict[str, Any] = {
            "rule": self.rule,
            "experts": {entry.expert: entry.weight for entry in self.experts},
        }
        if self.prompts:
            body["prompts"] = dict(self.prompts)
        return body

    def extra_body(self) -> dict[str, Any]:
        """For the plain `openai` client: `client.chat.completions.create(..., extra_body=fusion.extra_body())`."""
        return {"fusion": self.to_dict()}

    def model_name(self, base: str) -> str:
        """The same fusion as a model name, `atlas+qa:0.8`, for tools that can set nothing but `model`. Raises
        ValueError where a name cannot say it."""
        if self.prompts:
            raise ValueError("a model name has no place for prompts; send the fusion object instead")
        for entry in self.experts:
            if "+" in entry.expert or ":" in entry.expert:
                raise ValueError(
                    f"'{entry.expert}' cannot be part of a model name; send the fusion object instead"
                )
        return "".join([base, *(f"+{entry.expert}:{entry.weight!r}" for entry in self.experts)])
