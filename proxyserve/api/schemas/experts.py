"""The `experts` of a fusion object: three ways to write them, one meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from proxyserve.api.errors import field_path, shorten
from proxyserve.api.schemas.base import MAX_NAMED, AtMost
from proxyserve.errors import InvalidRequest, UnknownModel
from proxyserve.fusion.weights import LONGEST_SCHEDULE, ExpertWeight, Schedule

_PATH = ("fusion", "experts")

#: No expert and no rule has a longer name, so that a longer one need not be repeated in messages.
LONGEST_NAME = 64

_WEIGHT = {"type": "number", "description": "Multiplies the expert's delta. The server's policy bounds it."}
_SCHEDULE = {
    "type": ["array", "null"],
    "description": "Pairs of a generated token's number, rising from 0, and the factor of the weight from there on.",
    "minItems": 1,
    "items": {
        "type": "array",
        "prefixItems": [{"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, {"type": "number"}],
        "minItems": 2,
        "maxItems": 2,
    },
}

Path = tuple[int | str, ...]


def _parse_experts(value: Any) -> tuple[ExpertWeight, ...]:
    """Raises InvalidRequest with the path of what is wrong."""
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
    path: Path = (*_PATH, name)
    if isinstance(entry, Mapping):
        _require_known(entry, {"weight", "schedule"}, path)
        return _expert(name, entry.get("weight", 1.0), (*path, "weight"), entry.get("schedule"))
    return _expert(name, entry, path)


def _parse_listed(index: int, entry: Any) -> ExpertWeight:
    path: Path = (*_PATH, index)
    if not isinstance(entry, Mapping):
        raise InvalidRequest(
            f"'{field_path(path)}' must be an object with 'expert' and 'weight'.",
            param=field_path(path),
            code="invalid_type",
        )
    _require_known(entry, {"expert", "weight", "schedule"}, path)
    name = entry.get("expert")
    if not isinstance(name, str):
        where = field_path((*path, "expert"))
        raise InvalidRequest(f"'{where}' must be the name of an expert.", param=where, code="invalid_type")
    return _expert(name, entry.get("weight", 1.0), (*path, "weight"), entry.get("schedule"))


def _expert(name: str, weight: Any, path: Path, schedule: Any = None) -> ExpertWeight:
    """`path` is the weight's."""
    if len(name) > LONGEST_NAME:
        raise UnknownModel(f"There is no expert '{shorten(name)}' here.", param=field_path(_PATH))
    return ExpertWeight(name, _number(weight, path), _schedule(schedule, (*path[:3], "schedule")))


def _schedule(value: Any, path: Path) -> Schedule:
    if value is None:
        return ()
    where = field_path(path)
    pairs = value if isinstance(value, list) else [None]
    if len(pairs) > LONGEST_SCHEDULE:
        raise InvalidRequest(
            f"'{where}' has {len(pairs)} entries; at most {LONGEST_SCHEDULE} are allowed.", param=where
        )
    if not pairs or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InvalidRequest(
            f"'{where}' must be a list of [token number, factor], such as [[0, 1.0], [32, 0.25]].",
            param=where,
            code="invalid_type",
        )
    for index, (start, _) in enumerate(pairs):
        if type(start) is not int or not 0 <= start < 2**31:
            at = field_path((*path, index))
            raise InvalidRequest(f"'{at}' must begin with a token's number, 0 or more.", param=at)
    return tuple((start, _number(factor, (*path, index))) for index, (start, factor) in enumerate(pairs))


def _number(value: Any, path: Path) -> float:
    where = field_path(path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"'{where}' must be a number.", param=where, code="invalid_type")
    try:
        return float(value)
    except OverflowError as error:  # whole numbers of JSON have any length
        raise InvalidRequest(f"'{where}' is too large.", param=where) from error


def _require_known(entry: Mapping[str, Any], known: set[str], path: Path) -> None:
    for name in entry:
        if name not in known:
            where = field_path((*path, name))
            raise InvalidRequest(
                f"There is no '{where}'; an expert takes {' and '.join(sorted(known))}.",
                param=where,
                code="unknown_parameter",
            )


_ENTRY = {"weight": _WEIGHT, "schedule": _SCHEDULE}

ExpertWeights = Annotated[
    tuple[ExpertWeight, ...],
    PlainValidator(_parse_experts),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"minLength": 1, "maxLength": LONGEST_NAME},
                    "additionalProperties": {
                        "anyOf": [
                            _WEIGHT,
                            {"type": "object", "properties": _ENTRY, "additionalProperties": False},
                        ]
                    },
                },
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "expert": {"type": "string", "minLength": 1, "maxLength": LONGEST_NAME},
                            **_ENTRY,
                        },
                        "required": ["expert"],
                        "additionalProperties": False,
                    },
                },
            ],
            "examples": [{"qa": 0.8}, {"qa": {"weight": 0.8}}, [{"expert": "qa", "weight": 0.8}]],
        }
    ),
    AtMost(MAX_NAMED),
]
