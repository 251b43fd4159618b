"""What a rule is. Each is a frozen dataclass in a file of its own under `rules/`: its fields are the parameters that a
request gives, its docstring has the formula and where it comes from, and `compile` says it as a program."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, ClassVar

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.lane_prompt import LanePrompt
from proxyserve.fusion.program import Program
from proxyserve.fusion.weights import ExpertWeight


class Rule:
    """A named way to combine laws. Constructors raise InvalidRequest with the path of the parameter at fault."""

    __slots__ = ()

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for parameter in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            if "low" in parameter.metadata:
                check_number(
                    parameter.name,
                    getattr(self, parameter.name),
                    parameter.metadata["low"],
                    parameter.metadata["high"],
                )
        self.check()

    def check(self) -> None:
        """Raise InvalidRequest for parameters that do not go together."""

    @abstractmethod
    def compile(self, catalog: Catalog) -> Program:
        """The rule as a program over the lanes of `catalog`. Raises UnknownModel or InvalidRequest."""

    def prompts(self) -> Mapping[str, LanePrompt]:
        """Prompts of lanes that have their own by this rule."""
        return {}


def number(default: float, low: float, high: float, description: str) -> Any:
    """A dataclass field for a number from `low` to `high`."""
    return field(default=default, metadata={"low": low, "high": high, "description": description})


def optional(description: str, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field that is None unless it is given."""
    bounds = {} if low is None else {"low": low, "high": high}
    return field(default=None, metadata={"description": description, **bounds})


def check_number(name: str, value: float | None, low: float, high: float) -> None:
    """Raise InvalidRequest unless `value` is None or a number from `low` to `high`."""
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(
            f"'{name}' must be between {low:g} and {high:g}, not {value:g}.", param=f"fusion.{name}"
        )


def check_experts(experts: tuple[ExpertWeight, ...]) -> None:
    """Raise InvalidRequest if an expert is named twice."""
    seen: set[str] = set()
    for entry in experts:
        if entry.expert in seen:
            raise InvalidRequest(
                f"Expert '{entry.expert}' is named twice; give each expert one weight.",
                param="fusion.experts",
            )
        seen.add(entry.expert)


def only_expert(rule: str, experts: tuple[ExpertWeight, ...], instead: str) -> str:
    """The name of the one expert of a rule that does not weigh it. `instead` says what does. Raises InvalidRequest."""
    if len(experts) != 1:
        raise InvalidRequest(
            f"Rule '{rule}' takes exactly one expert, not {len(experts)}.", param="fusion.experts"
        )
    entry = experts[0]
    if entry.weight != 1.0 or entry.schedule:
        raise InvalidRequest(
            f"Rule '{rule}' does not weigh its expert: give '{entry.expert}' the weight 1, without a schedule; "
            f"{instead}.",
            param=f"fusion.experts.{entry.expert}",
        )
    return entry.expert
