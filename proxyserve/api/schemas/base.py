"""What every request body is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class RequestModel(BaseModel):
    """A body, or an object in one. No conversions, no unknown fields; null means that a field is left out."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True, frozen=True
    )


#: JSON schemas, for `json_schema_extra`, of fields that must be given or left out. Null is a field left out.
GIVEN: Final = {"not": {"type": "null"}}
LEFT_OUT: Final = {"type": "null"}


def exactly_one(*names: str) -> dict[str, Any]:
    """For `json_schema_extra`: one of these fields must be given."""
    return {"oneOf": _each_given(names)}


def at_least_one(*names: str) -> dict[str, Any]:
    """For `json_schema_extra`: one of these fields must be given, or several."""
    return {"anyOf": _each_given(names)}


def _each_given(names: Sequence[str]) -> list[dict[str, Any]]:
    return [{"required": [name], "properties": {name: GIVEN}} for name in names]


class NotYet:
    """Annotates a field of OpenAI's API that this version does not have. Only `off`, the values that ask for nothing,
    pass; anything else is refused by name, and the OpenAPI document says so. `instead` is the field to use;
    `advice` says more than that."""

    def __init__(self, *off: Any, instead: str | None = None, advice: str = "Leave it out.") -> None:
        self._off = (None, *off)
        self._advice = advice if instead is None else f"Use '{instead}'."

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._require_off)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self._off), "description": "Not supported yet; only these values are accepted."}

    def _require_off(self, value: Any) -> Any:
        # The types must agree as well, since True == 1 and False == 0.
        if any(type(value) is type(off) and value == off for off in self._off):
            return value
        raise PydanticCustomError("not_supported_yet", self._advice)
