"""Fusions as JSON outside of requests: presets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from proxyserve.api.errors import validation_problem
from proxyserve.api.schemas.fusion import FusionObject
from proxyserve.api.schemas.rule_models import AnyFusion
from proxyserve.errors import InvalidRequest
from proxyserve.fusion.fusion import Fusion
from proxyserve.types import NAME

_FUSIONS: TypeAdapter[FusionObject] = TypeAdapter(AnyFusion)


def parse_fusion(value: Any) -> Fusion:
    """A fusion object as it stands in requests. Raises InvalidRequest."""
    try:
        return _FUSIONS.validate_python(value).fusion()
    except ValidationError as error:
        detail = validation_problem(
            [{**first, "loc": ("body", "fusion", *first["loc"])} for first in error.errors()]
        )
        raise InvalidRequest(detail.detail.message, param=detail.detail.param) from None


def parse_presets(texts: Mapping[str, str], taken: set[str]) -> dict[str, Fusion]:
    """Fusion objects by preset name, from JSON. Names in `taken` are models already. Raises InvalidRequest."""
    presets = {}
    for name, text in texts.items():
        if not NAME.fullmatch(name) or name in taken:
            raise InvalidRequest(
                f"'{name}' cannot name a preset; use letters, digits, '_' and '-', and no name of a base or an expert."
            )
        try:
            presets[name] = parse_fusion(json.loads(text))
        except InvalidRequest as error:
            raise InvalidRequest(f"Preset '{name}': {error.message}", param=error.param) from None
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"Preset '{name}' is not JSON: {error}") from None
    return presets
