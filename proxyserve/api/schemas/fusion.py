"""The `fusion` object of requests and of responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from proxyserve.api.errors import field_path
from proxyserve.api.schemas.base import (
    MAX_NAMED,
    MAX_PROMPT_IDS,
    AtMost,
    NotYet,
    RequestModel,
    at_least_one,
    exactly_one,
)
from proxyserve.api.schemas.experts import LONGEST_NAME
from proxyserve.api.schemas.message import Message, Messages, rendered
from proxyserve.errors import InvalidRequest
from proxyserve.fusion.fusion import Fusion, Gate, Support
from proxyserve.fusion.lane_prompt import LanePrompt
from proxyserve.fusion.rule import Rule
from proxyserve.fusion.rules import RULES
from proxyserve.fusion.weights import ExpertWeight

LaneName = Annotated[str, Field(max_length=3 * LONGEST_NAME)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1), AtMost(MAX_PROMPT_IDS)]


class SupportObject(RequestModel):
    """Keep only tokens that at least one law of `of` finds likely."""

    model_config = ConfigDict(json_schema_extra=at_least_one("top_p", "top_k", "min_p"))

    of: Annotated[list[LaneName], Field(min_length=1), AtMost(16)] = Field(
        description="`base`, `tuned` (of every expert), `fused`, or names of lanes."
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="Share of the law's largest probability."
    )
    outside: Literal["mask", "base"] = Field(
        "mask", description="Remove the token, or leave it to the base alone."
    )

    def support(self) -> Support:
        return Support(tuple(self.of), self.top_p, self.top_k, self.min_p, self.outside)


class GateObject(RequestModel):
    """Where the base gives its best token at least this probability it decides alone; the experts' lanes do not run."""

    confidence: Annotated[float, Field(ge=0.0, le=1.0)]


class LanePromptObject(RequestModel):
    """A prompt of a lane's own; give one field. `prefix` goes before the request's prompt. `"chat"` is short for
    `{"route": "chat"}`."""

    model_config = ConfigDict(json_schema_extra=exactly_one("route", "text", "tokens", "messages", "prefix"))

    route: Literal["chat", "plain"] | None = None
    text: Annotated[str, Field(min_length=1)] | None = None
    tokens: TokenIds | None = None
    messages: Messages | None = None
    prefix: Annotated[str, Field(min_length=1)] | None = None

    def lane_prompt(self, param: str) -> LanePrompt:
        """`param` names this object. Raises InvalidRequest."""
        return LanePrompt(
            route=self.route,
            text=self.text,
            tokens=tuple(self.tokens) if self.tokens else None,
            messages=tuple(rendered(self.messages, f"{param}.messages")) if self.messages else None,
            prefix=self.prefix,
        )


def _route_or_object(value: Any) -> Any:
    return {"route": value} if isinstance(value, str) else value


LanePromptEntry = Annotated[LanePromptObject, BeforeValidator(_route_or_object)]


class FusionObject(RequestModel):
    """What stands beside every rule. The parameters of a rule stand next to it; its own class adds them."""

    rule_class: ClassVar[type[Rule]]

    support: SupportObject | None = None
    target_entropy: Annotated[float, Field(ge=0.0)] | None = Field(
        None,
        description="Nats. Solve the temperature at each position so that the fused law has this entropy.",
    )
    gate: GateObject | None = None
    prompts: Annotated[dict[LaneName, LanePromptEntry], AtMost(MAX_NAMED)] | None = Field(
        None,
        description="Per lane (`base`, `EXPERT.tuned`, `EXPERT.untuned`, `base@VARIANT`): `chat` renders the request's "
        "messages with a chat template, `plain` gives the lane their text alone, an object gives a prompt of its own.",
    )
    explain: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None,
        description="k > 0: say for each token what every lane thought of it, with its k likeliest tokens.",
    )
    on_expert_failure: Annotated[Any, NotYet("fail")] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_parameters_of_other_rules(cls, value: Any) -> Any:
        for name in value if isinstance(value, Mapping) else ():
            if name not in cls.model_fields:
                _refuse(cls.rule_class, str(name))
        return value

    def fusion(self, experts: tuple[ExpertWeight, ...] = ()) -> Fusion:
        """As the engine wants it. `experts` are those of the model's name, for rules that take any. Raises
        InvalidRequest."""
        names = _parameters(self.rule_class)
        given = {
            name: _plain(value, f"fusion.{name}")
            for name in names
            if (value := getattr(self, name)) is not None
        }
        if experts:
            given.setdefault("experts", experts)
        return replace(
            self.fusion_beside(),
            rule=self.rule_class(**given),
            support=None if self.support is None else self.support.support(),
            target_entropy=self.target_entropy,
            gate=None if self.gate is None else Gate(self.gate.confidence),
        )

    def fusion_beside(self) -> Fusion:
        """What does not change the law: explanation and prompts. Raises InvalidRequest."""
        prompts = {
            name: entry.lane_prompt(f"fusion.prompts.{name}") for name, entry in (self.prompts or {}).items()
        }
        return Fusion(explain=self.explain or 0, prompts=prompts)


def _plain(value: Any, param: str) -> Any:
    """Lists as tuples and messages as templates want them."""
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], Message):
        return tuple(rendered(value, param))
    return tuple(_plain(entry, param) for entry in value)


def _refuse(rule: type[Rule], name: str) -> None:
    """There is no such field; say whose it may be."""
    owners = [other.name for other in RULES.values() if name in _parameters(other)]
    own = ", ".join(_parameters(rule)) or "no parameters"
    where = field_path(("fusion", name))
    raise InvalidRequest(
        f"'{where}' is no parameter of rule '{rule.name}', which takes {own}"
        + (f"; it belongs to rule {' and '.join(owners)}." if owners else "."),
        param=where,
        code="unknown_parameter",
    )


def _parameters(rule: type[Rule]) -> list[str]:
    return [parameter.name for parameter in fields(rule)]  # type: ignore[arg-type]


class FusionSummary(BaseModel):
    """What fusion did to a response, over all of its choices.

    `mean_kl` is the mean over generated positions of KL(fused || base) in nats; `flips` counts the positions where the
    fused argmax differs from the base's; both are null for rules that do not run the base, and where nothing was
    generated. `generations` says which version of each expert answered. `mean_weights`, for rules that solve weights,
    is their mean per expert.

    Where the base is on another server, which returns its likeliest tokens only, `certified` counts generated tokens
    whose greedy choice is sure to be the one over the base's whole law, `mean_unseen_mass` is the mean of the base's
    probability that was not returned, and KL and flips are over the returned tokens.

    `drafted` counts tokens that were proposed ahead of the text, `accepted` those of them that it has; both are there
    where any was proposed.
    """

    rule: str
    sum_of_weights: float
    generations: dict[str, int]
    mean_kl: float | None
    flips: int | None
    mean_weights: dict[str, float] | None = None
    certified: int | None = None
    mean_unseen_mass: float | None = None
    drafted: int | None = None
    accepted: int | None = None
