"""The fusion object of each rule, made from the rule's own dataclass: a new rule needs nothing here unless one of its
parameters is written in JSON in a way of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import Discriminator, Field, PlainValidator, Tag, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from proxyserve.api.errors import shorten
from proxyserve.api.schemas.base import MAX_NAMED, MAX_PROMPT_IDS, AtMost
from proxyserve.api.schemas.experts import ExpertWeights
from proxyserve.api.schemas.fusion import FusionObject, LaneName
from proxyserve.api.schemas.message import Messages
from proxyserve.errors import InvalidRequest
from proxyserve.fusion.rule import Rule
from proxyserve.fusion.rules import RULES

DEFAULT_RULE = "proxy"


def _text_or_ids(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return value
    if (
        isinstance(value, list)
        and 0 < len(value) <= MAX_PROMPT_IDS
        and all(type(token) is int and 0 <= token < 2**31 for token in value)
    ):
        return tuple(value)
    raise PydanticCustomError("prompt_type", "It must be a text or a list of token ids, and not empty")


def _exponent(value: Any) -> float | str:
    if value in ("inf", "-inf") or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value if isinstance(value, str) else max(-1e9, min(1e9, value))
    raise PydanticCustomError("exponent_type", 'It must be a number, "inf" or "-inf"')


#: How a parameter's type is written in JSON, where it is not as the rule's dataclass has it.
_JSON_TYPES: Mapping[str, Any] = {
    "experts": ExpertWeights,
    "negative_prompt": Annotated[
        str | tuple[int, ...],
        PlainValidator(_text_or_ids),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": MAX_PROMPT_IDS,
                        "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
                    },
                ]
            }
        ),
    ],
    "r": Annotated[
        float | str,
        PlainValidator(_exponent),
        WithJsonSchema(
            {"anyOf": [{"type": "number", "minimum": -100, "maximum": 100}, {"enum": ["inf", "-inf"]}]}
        ),
    ],
    "negative_messages": Messages,
    "models": Annotated[dict[LaneName, float], AtMost(MAX_NAMED)],
    "formula": Annotated[str, Field(min_length=1, max_length=2000)],
}


def _model_of(rule: type[Rule]) -> type[FusionObject]:
    """The fusion object with the parameters of one rule. Null means left out, as everywhere."""
    hints = get_type_hints(rule)
    required = {parameter.name for parameter in fields(rule) if parameter.default is MISSING}  # type: ignore[arg-type]
    # An object without a rule is of the default one.
    parameters: dict[str, Any] = {
        "rule": (Literal[rule.name] | None, None) if rule.name == DEFAULT_RULE else (Literal[rule.name], ...)
    }
    for parameter in fields(rule):  # type: ignore[arg-type]
        bounds = {
            keyword: parameter.metadata[name]
            for keyword, name in (("ge", "low"), ("le", "high"))
            if math.isfinite(parameter.metadata.get(name, math.inf))
        }
        kind = _JSON_TYPES.get(parameter.name, hints[parameter.name])
        parameters[parameter.name] = (
            kind | None,
            Field(
                None,
                description=parameter.metadata.get("description"),
                json_schema_extra={} if parameter.name in required else {"default": _json(parameter.default)},
                **bounds,
            ),
        )
    return create_model(
        f"{rule.__name__}Fusion",
        __base__=FusionObject,
        __doc__=rule.__doc__,
        __module__=__name__,
        **parameters,
    )


def _json(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def _named_rule(value: Any) -> str | None:
    """The rule of a fusion object as it came."""
    rule = value.get("rule") if isinstance(value, Mapping) else getattr(value, "rule", None)
    if rule is None:
        return DEFAULT_RULE
    if not isinstance(rule, str) or rule not in RULES:
        named = (
            f"There is no rule '{shorten(rule)}'" if isinstance(rule, str) else "'fusion.rule' must be a name"
        )
        raise InvalidRequest(f"{named}; the rules are {', '.join(sorted(RULES))}.", param="fusion.rule")
    return rule


def _models() -> list[Any]:
    models = []
    for name, rule in RULES.items():
        model = _model_of(rule)
        model.rule_class = rule
        models.append(Annotated[model, Tag(name)])
    return models


if TYPE_CHECKING:
    AnyFusion = FusionObject
else:
    AnyFusion = Annotated[reduce(or_, _models()), Discriminator(_named_rule)]
