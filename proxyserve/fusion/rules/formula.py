"""Rule `formula`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from proxyserve.errors import InvalidRequest, UnknownModel
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.formula_text import parse_formula, point_at
from proxyserve.fusion.program import BASE_LANE, Program
from proxyserve.fusion.rule import Rule
from proxyserve.fusion.sums import as_sum

if TYPE_CHECKING:
    from proxyserve.fusion.fusion import Fusion

_PARAM = "fusion.formula"


@dataclass(frozen=True, slots=True)
class Formula(Rule):
    """Any sum `sum_j c_j l(model_j, prompt_j)`, written as text: `base + 0.8*(qa.tuned - small) + 0.3*arith`.

    A name is `base`, `EXPERT.tuned`, `EXPERT.untuned`, an untuned model's own name, each with `@VARIANT` for a prompt
    of its own (given in `prompts`); an expert's name alone is its delta, a preset's name the preset's sum. The weighted
    sum minimises a weighted sum of KL divergences (Dekoninck et al. 2024, arXiv 2311.14479).
    """

    name: ClassVar[str] = "formula"

    formula: str = field(default="", metadata={"description": "A linear sum of log-probs of models."})

    def check(self) -> None:
        parse_formula(self.formula)

    def compile(self, catalog: Catalog) -> Program:
        coefficients = _coefficients(self, catalog, ())
        if not coefficients:
            raise InvalidRequest("The formula's terms cancel: nothing is left of it.", param=_PARAM)
        origin = BASE_LANE
        if BASE_LANE not in coefficients:
            origin = max(coefficients, key=lambda lane: coefficients[lane])
        return as_sum(coefficients, origin, _PARAM)


def _coefficients(rule: Formula, catalog: Catalog, within: tuple[str, ...]) -> dict[str, float]:
    """Of each lane, in order of first appearance. `within` are the presets whose formulas are being resolved."""
    total: dict[str, float] = {}
    for term in parse_formula(rule.formula):
        try:
            parts = _meaning(term.name, catalog, within)
        except UnknownModel as error:
            raise UnknownModel(
                f"{error.message}\nAt character {term.position + 1}:\n{point_at(rule.formula, term.position)}",
                param=_PARAM,
            ) from None
        for lane, coefficient in parts.items():
            total[lane] = total.get(lane, 0.0) + term.coefficient * coefficient
    return {lane: coefficient for lane, coefficient in total.items() if coefficient != 0.0}


def _meaning(name: str, catalog: Catalog, within: tuple[str, ...]) -> dict[str, float]:
    """The lanes that a name stands for and their coefficients."""
    if name in catalog.models.experts:
        tuned, untuned = catalog.pair(name)
        return {tuned: 1.0, untuned: -1.0}
    preset = catalog.presets.get(name)
    return {catalog.lane(name, _PARAM): 1.0} if preset is None else _of_preset(name, preset, catalog, within)


def _of_preset(name: str, preset: Fusion, catalog: Catalog, within: tuple[str, ...]) -> dict[str, float]:
    if name in within:
        raise InvalidRequest(
            f"Preset '{name}' is made of itself: {' -> '.join((*within, name))}.", param=_PARAM
        )
    if isinstance(preset.rule, Formula) and preset.is_bare:
        return _coefficients(preset.rule, catalog, (*within, name))
    program = preset.compile(catalog)
    if not (preset.is_bare and program.is_plain_sum):
        raise InvalidRequest(
            f"Preset '{name}' (rule '{preset.rule.name}') is no plain sum, so it cannot be a part of a formula.",
            param=_PARAM,
        )
    return program.coefficients()
