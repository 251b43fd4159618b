"""Fusion in a model name, for clients that can set nothing else: `BASE`, `BASE+EXPERT[:WEIGHT][+EXPERT[:WEIGHT]…]`, or
a preset's name."""

from __future__ import annotations

import re

from proxyserve.errors import InvalidRequest, UnknownModel
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import Fusion
from proxyserve.fusion.rules.proxy import Proxy
from proxyserve.fusion.weights import ExpertWeight

#: As JSON writes numbers, and `.5`, `5.`; Python's own `float` takes line breaks, underscores and other digits as well.
_NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE]-?[0-9]+)?")


def parse_model_name(name: str, catalog: Catalog) -> Fusion:
    """`atlas+qa:0.8+arith` -> rule `proxy` with qa at 0.8 and arith at 1.0. Raises UnknownModel for names that are
    not here and InvalidRequest for a weight that is no number."""
    if name in catalog.presets:
        return catalog.presets[name]
    models = catalog.models
    base, *parts = name.split("+")
    if base != models.base.name:
        raise UnknownModel(
            f"There is no model '{name}' here. Use '{models.base.name}', '{models.base.name}+EXPERT:WEIGHT' or a "
            "preset; GET /v1/models lists those that the key may use."
        )
    experts = []
    for part in parts:
        expert, colon, weight = part.partition(":")
        models.expert(expert, param="model")
        try:
            experts.append(ExpertWeight(expert, _number(weight) if colon else 1.0))
        except (ValueError, InvalidRequest):
            raise InvalidRequest(
                f"'{weight}' in the model name '{name}' is not a finite number; write {expert}:0.8, say.",
                param="model",
            ) from None
    try:
        return Fusion(Proxy(tuple(experts)))
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param="model") from None


def _number(text: str) -> float:
    """Raises ValueError."""
    if _NUMBER.fullmatch(text) is None:
        raise ValueError(text)
    return float(text)
