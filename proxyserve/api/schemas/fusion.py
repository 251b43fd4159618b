"""The `fusion` object of requests and of responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema

from proxyserve.api.errors import field_path, shorten
from proxyserve.api.schemas.base import NotYet, RequestModel
from proxyserve.errors import InvalidRequest, UnknownModel
from proxyserve.fusion.spec import ExpertWeight

_PATH = ("fusion", "experts")

#: No expert and no rule has a longer name, so that a longer one need not be repeated in messages.
_LONGEST_NAME = 64

_WEIGHT = {"type": "number", "description": "Multiplies the expert's delta. The server's policy bounds it."}


def _parse_experts(value: Any) -> tuple[ExpertWeight, ...]:
    """The three ways to write experts, as one. Raises InvalidRequest with the path of what is wrong."""
    if isinstance(value, Mapping):
        return tuple(_parse_mapped(name, entry) for name, entry in value.items())
    if isinstance(value, list):
        return tuple(_parse_listed(index, entry) for index, entry in enumerate(value))
    raise InvalidRequest(
        "'fusion.experts' must map names to weights, as in {\"qa\": 0.8}, or be a list of "
        '{"expert": name, "weight": number}.',
        param=field_path(_PATH),
        code="invalid_type",
    )


def _parse_mapped(name: str, entry: Any) -> ExpertWeight:
    path = (*_PATH, name)
    if isinstance(entry, Mapping):
        _require_known(entry, {"weight"}, path)
        return _expert(name, entry.get("weight", 1.0), (*path, "weight"))
    return _expert(name, entry, path)


def _parse_listed(index: int, entry: Any) -> ExpertWeight:
    path = (*_PATH, index)
    if not isinstance(entry, Mapping):
        raise InvalidRequest(
            f"'{field_path(path)}' must be an object with 'expert' and 'weight'.",
            param=field_path(path),
            code="invalid_type",
        )
    _require_known(entry, {"expert", "weight"}, path)
    name = entry.get("expert")
    if not isinstance(name, str):
        where = field_path((*path, "expert"))
        raise InvalidRequest(f"'{where}' must be the name of an expert.", param=where, code="invalid_type")
    return _expert(name, entry.get("weight", 1.0), (*path, "weight"))


def _expert(name: str, weight: Any, path: tuple[int | str, ...]) -> ExpertWeight:
    """`path` is the weight's."""
    where = field_path(path)
    if len(name) > _LONGEST_NAME:
        raise UnknownModel(f"There is no expert '{shorten(name)}' here.", param=field_path(_PATH))
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise InvalidRequest(f"'{where}' must be a number.", param=where, code="invalid_type")
    try:
        return ExpertWeight(name, float(weight))
    except OverflowError as error:  # whole numbers of JSON have any length
        raise InvalidRequest(f"'{where}' is too large.", param=where) from error


def _require_known(entry: Mapping[str, Any], known: set[str], path: tuple[int | str, ...]) -> None:
    for name in entry:
        if name not in known:
            where = field_path((*path, name))
            raise InvalidRequest(
                f"'{where}' is not there yet; this version takes {' and '.join(sorted(known))} for an expert.",
                param=where,
                code="unsupported_parameter",
            )


ExpertWeights = Annotated[
    tuple[ExpertWeight, ...],
    PlainValidator(_parse_experts),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "additionalProperties": {
                        "anyOf": [
                            _WEIGHT,
                            {
                                "type": "object",
                                "properties": {"weight": _WEIGHT},
                                "additionalProperties": False,
                            },
                        ]
                    },
                },
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"expert": {"type": "string"}, "weight": _WEIGHT},
                        "required": ["expert"],
                        "additionalProperties": False,
                    },
                },
            ],
            "examples": [{"qa": 0.8}, {"qa": {"weight": 0.8}}, [{"expert": "qa", "weight": 0.8}]],
        }
    ),
]


class FusionObject(RequestModel):
    """What to do with the base's logits: `l_base + sum of weight * (l_tuned - l_untuned)` over the experts."""

    rule: Annotated[str, Field(max_length=_LONGEST_NAME), WithJsonSchema({"const": "proxy"})] | None = None
    experts: ExpertWeights | None = None
    prompts: dict[str, Literal["chat", "plain"]] | None = Field(
        None,
        description="Chat only. Per lane (`base`, `EXPERT.tuned`, `EXPERT.untuned`): `chat` renders the messages with "
        "a chat template, `plain` gives the lane their text alone.",
    )

    support: Annotated[Any, NotYet()] = None
    explain: Annotated[Any, NotYet(0)] = None
    on_expert_failure: Annotated[Any, NotYet("fail")] = None
    target_entropy: Annotated[Any, NotYet()] = None


class FusionSummary(BaseModel):
    """What fusion did to a response, over all of its choices.

    `mean_kl` is the mean over generated positions of KL(fused || base) in nats; `flips` counts the positions where the
    fused argmax differs from the base's; `generations` says which version of each expert answered.
    """

    rule: str
    sum_of_weights: float
    generations: dict[str, int]
    mean_kl: float
    flips: int
