"""What a request asks of fusion, as objects that check themselves before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

#: How a lane is prompted: by a chat template, by the messages' text alone, or by a prompt of its own, such as
#: `{"text": "..."}`, `{"tokens": [...]}`, `{"messages": [...]}` or `{"prefix": "..."}`.
PromptForm = Literal["chat", "plain"] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """One expert and the real number that multiplies its delta, times the factors of `schedule` if there is one: pairs
    of a generated token's number, rising from 0, and the factor from there on. Raises ValueError for an empty name or a
    weight that is not finite; which finite weights are allowed is the server's policy."""

    expert: str
    weight: float = 1.0
    schedule: Sequence[tuple[int, float]] = ()

    def __post_init__(self) -> None:
        if not self.expert:
            raise ValueError("an expert's name must not be empty")
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of expert '{self.expert}' must be finite, not {self.weight}")

    def to_json(self) -> float | dict[str, Any]:
        """As it stands in a request."""
        if not self.schedule:
            return self.weight
        return {"weight": self.weight, "schedule": [list(pair) for pair in self.schedule]}


@dataclass(frozen=True, slots=True)
class Fusion:
    """The `fusion` object of a request; there is a builder for each rule.

    `prompts` says, per lane (`base`, `EXPERT.tuned`, `EXPERT.untuned`, `base@VARIANT`), how it is prompted; lanes that
    it does not name get the server's choice. `parameters` are the rule's own (`{"beta": 2.0}`) and what stands
    beside every rule (`support`, `target_entropy`, `gate`, `explain`); the server checks them.
    """

    experts: tuple[ExpertWeight, ...] = ()
    rule: str = "proxy"
    prompts: Mapping[str, PromptForm] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [entry.expert for entry in self.experts]
        if len(set(names)) < len(names):
            raise ValueError(f"each expert has one weight, but these are named: {', '.join(names)}")
        for name, value in self.parameters.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"'{name}' must be finite, not {value}")
        object.__setattr__(self, "prompts", MappingProxyType(dict(self.prompts)))
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))

    @classmethod
    def proxy(cls, weights: Mapping[str, float] | None = None, /, **more_weights: float) -> Fusion:
        """`Fusion.proxy(qa=0.8, record=1.0)`. Names that are not Python names go in a mapping:
        `Fusion.proxy({"qa-v2": 0.8})`."""
        entries = [*(weights or {}).items(), *more_weights.items()]
        return cls(tuple(ExpertWeight(name, weight) for name, weight in entries))

    @classmethod
    def upscale(cls, expert: str, *, beta: float | None = None, top_p: float | None = None) -> Fusion:
        """`tuned + beta * (base - untuned)` inside the tuned model's nucleus: emulated fine-tuning."""
        return cls.of_rule("upscale", {expert: 1}, beta=beta, top_p=top_p)

    @classmethod
    def dynamic(
        cls,
        experts: str | Mapping[str, float],
        *,
        mode: Literal["exact", "ray", "budget", "paper"] | None = None,
        match: Literal["both", "forward", "reverse"] | None = None,
        max_weight: float | None = None,
        kl: float | None = None,
    ) -> Fusion:
        """`proxy` with weights that are solved at each position. For several experts their weights are a direction."""
        weights = {experts: 1.0} if isinstance(experts, str) else experts
        return cls.of_rule("dynamic", weights, mode=mode, match=match, max_weight=max_weight, kl=kl)

    @classmethod
    def contrast(cls, expert: str, *, gamma: float | None = None, alpha: float | None = None) -> Fusion:
        """`tuned - gamma * untuned` where the tuned model finds a token plausible: what tuning added."""
        return cls.of_rule("contrast", {expert: 1}, gamma=gamma, alpha=alpha)

    @classmethod
    def unlearn(cls, expert: str, *, alpha: float | None = None) -> Fusion:
        """`base - alpha * max(0, tuned - base)`: away from what the expert was reinforced on."""
        return cls.of_rule("unlearn", {expert: 1}, alpha=alpha)

    @classmethod
    def guidance(
        cls,
        negative_prompt: str | Sequence[int] | None = None,
        *,
        negative_messages: Sequence[Mapping[str, Any]] | None = None,
        scale: float | None = None,
    ) -> Fusion:
        """`negative + scale * (positive - negative)`, both the base: away from a prompt. Raises ValueError unless the
        negative one is given once, as a prompt or as messages."""
        if (negative_prompt is None) == (negative_messages is None):
            raise ValueError("give negative_prompt or negative_messages, one of them")
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            negative_prompt = list(negative_prompt)
        messages = None if negative_messages is None else list(negative_messages)
        return cls.of_rule(
            "guidance", negative_prompt=negative_prompt, negative_messages=messages, scale=scale
        )

    @classmethod
    def mixture(
        cls, models: Mapping[str, float], *, r: float | Literal["inf", "-inf"] | None = None
    ) -> Fusion:
        """A power mean of the laws of models (`base`, `qa.tuned`, `qa.untuned`), by weights that sum to 1."""
        return cls.of_rule("mixture", models=dict(models), r=r)

    @classmethod
    def arm(cls, weights: Mapping[str, float] | None = None, /, **more_weights: float) -> Fusion:
        """`base + sum of weight * tuned`: small reward models of tokens, without untuned ones."""
        return cls.of_rule("arm", {**(weights or {}), **more_weights})

    @classmethod
    def edit(cls, expert: str, *, budget: float | None = None) -> Fusion:
        """`proxy` at the largest weight that the server's calibration allows within a loss budget."""
        return cls.of_rule("edit", {expert: 1}, budget=budget)

    @classmethod
    def formula(cls, text: str) -> Fusion:
        """Any sum of models as text: `base + 0.8*(qa.tuned - small)`."""
        return cls.of_rule("formula", formula=text)

    @classmethod
    def of_rule(cls, rule: str, experts: Mapping[str, float] | None = None, /, **parameters: Any) -> Fusion:
        """Any rule, also one that this version knows nothing of: `Fusion.of_rule("upscale", {"qa": 1}, beta=1.5)`.
        Parameters that are None are left out."""
        entries = (experts or {}).items()
        given = {name: value for name, value in parameters.items() if value is not None}
        return cls(tuple(ExpertWeight(*entry) for entry in entries), rule, parameters=given)

    def with_prompts(self, prompts: Mapping[str, PromptForm]) -> Fusion:
        """The same fusion with other prompts: `.with_prompts({"base": "plain"})`."""
        return replace(self, prompts=prompts)

    def with_parameters(self, **parameters: Any) -> Fusion:
        """The same fusion with these parameters as well: `.with_parameters(explain=3)`."""
        return replace(self, parameters={**self.parameters, **parameters})

    def to_dict(self) -> dict[str, Any]:
        """The value of the field `fusion` in a request's JSON."""
        body: dict[str, Any] = {"rule": self.rule}
        if self.experts or self.rule == "proxy":  # some rules take none
            body["experts"] = {entry.expert: entry.to_json() for entry in self.experts}
        if self.prompts:
            body["prompts"] = dict(self.prompts)
        return {**body, **self.parameters}

    def extra_body(self) -> dict[str, Any]:
        """For the plain `openai` client: `client.chat.completions.create(..., extra_body=fusion.extra_body())`."""
        return {"fusion": self.to_dict()}

    def model_name(self, base: str) -> str:
        """The same fusion as a model name, `atlas+qa:0.8`, for tools that can set nothing but `model`. Raises
        ValueError where a name cannot say it."""
        if (
            self.prompts
            or self.parameters
            or self.rule != "proxy"
            or any(entry.schedule for entry in self.experts)
        ):
            raise ValueError(
                "a model name has no place for prompts, parameters, schedules or another rule than 'proxy'; send the "
                "fusion object instead"
            )
        for entry in self.experts:
            if "+" in entry.expert or ":" in entry.expert:
                raise ValueError(
                    f"'{entry.expert}' cannot be part of a model name; send the fusion object instead"
                )
        return "".join([base, *(f"+{entry.expert}:{entry.weight!r}" for entry in self.experts)])
