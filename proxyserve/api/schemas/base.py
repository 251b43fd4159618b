"""What every request body is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

#: No list or map of a body has more entries, whatever it is for. What a server allows is in `Limits`, far below.
MAX_ENTRIES: Final = 65_536
#: Most token ids of one prompt, above any model's context.
MAX_PROMPT_IDS: Final = 2**20
#: Most experts, models or lanes that a request names.
MAX_NAMED: Final = 1024


class RequestModel(BaseModel):
    """A body, or an object in one. No conversions, no unknown fields; null means that a field is left out."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True, frozen=True
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_floods_of_unknown_fields(cls, value: Any) -> Any:
        """Of an object with more fields than there are, the first unknown one is reported; the validator itself would
        report each of them, which takes minutes for millions."""
        if not isinstance(value, Mapping) or len(value) <= len(cls.model_fields):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in value if name not in known)
        raise ValidationError.from_exception_data(
            cls.__name__, [{"type": "extra_forbidden", "loc": (unknown,), "input": None}]
        )


class AtMost:
    """Annotates a list or a map of a body: more than `most` entries are refused before any of them is looked at, and
    the first bad entry ends the validation. Validators collect an error for each otherwise, on the event loop."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        inner: Any = schema
        while inner["type"] not in ("list", "dict") and "schema" in inner:
            inner = inner["schema"]
        if inner["type"] in ("list", "dict"):
            inner["fail_fast"] = True
        return core_schema.no_info_before_validator_function(self._require_few, schema)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        document = handler(schema)
        for form in document.get("anyOf", [document]):
            if form.get("type") == "array":
                form["maxItems"] = self._most
            elif form.get("type") == "object":
                form["maxProperties"] = self._most
        return document

    def _require_few(self, value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > self._most:
            raise PydanticCustomError(
                "too_many",
                "It has {count} entries; {most} are the most",
                {"count": len(value), "most": self._most},
            )
        return value


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
