"""What is refused at a glance, before anything is compiled: sizes, depth, references to elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from proxyserve.config import GrammarLimits
from proxyserve.errors import InvalidRequest

#: Keywords whose values are data and no schemas.
_DATA = frozenset({"const", "enum", "default", "examples", "example"})


def check_text(text: str, most: int, param: str) -> None:
    """Raises InvalidRequest for a text that is empty, above `most` characters, or not Unicode (half a surrogate
    pair)."""
    if not text:
        raise InvalidRequest(f"'{param}' must not be empty.", param=param)
    if len(text) > most:
        raise InvalidRequest(f"'{param}' has {len(text)} characters; this server allows {most}.", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"'{param}' has half a surrogate pair; send whole characters.", param=param
        ) from error


def check_count(items: Sequence[Any], most: int, param: str, what: str) -> None:
    """Raises InvalidRequest for none and for more than `most`."""
    if not items:
        raise InvalidRequest(f"'{param}' must not be empty.", param=param)
    if len(items) > most:
        raise InvalidRequest(f"'{param}' has {len(items)} {what}; this server allows {most}.", param=param)


def schema_text(schema: Any, limits: GrammarLimits, param: str) -> str:
    """A JSON schema as JSON, its keys in their order. Raises InvalidRequest, naming the keyword, for what is above
    `limits` and for references to anywhere but the schema itself."""
    properties = values = 0
    if isinstance(schema, dict) and "x-guidance" in schema:
        # The library's own switch, which could turn off what it cannot enforce.
        raise InvalidRequest("'x-guidance' is no keyword of JSON schema; leave it out.", param=param)
    left: list[tuple[Any, int, bool]] = [(schema, 1, True)]
    while left:
        node, depth, is_schema = left.pop()
        if depth > limits.max_depth and isinstance(node, dict | list):
            raise InvalidRequest(
                f"The schema is nested more than {limits.max_depth} levels deep; flatten it, or use '$defs'.",
                param=param,
            )
        if isinstance(node, dict):
            if is_schema:
                _check_reference(node, param)
                if isinstance(node.get("pattern"), str):
                    check_text(node["pattern"], limits.max_regex_length, f"{param}: pattern")
                properties += _size(node.get("properties"), dict) + _size(node.get("patternProperties"), dict)
                values += _size(node.get("enum"), list)
            left += [(value, depth + 1, is_schema and key not in _DATA) for key, value in node.items()]
        elif isinstance(node, list):
            left += [(value, depth + 1, is_schema) for value in node]
    for count, most, what in (
        (properties, limits.max_properties, "properties"),
        (values, limits.max_enum, "values in 'enum'"),
    ):
        if count > most:
            raise InvalidRequest(f"The schema has {count} {what}; this server allows {most}.", param=param)
    text = json.dumps(schema, separators=(",", ":"))
    check_text(text, limits.max_length, param)
    return text


def _check_reference(node: dict[str, Any], param: str) -> None:
    target = node.get("$ref")
    if isinstance(target, str) and not target.startswith("#"):
        raise InvalidRequest(
            "'$ref' may only point into the schema itself ('#/...'): nothing is fetched.", param=param
        )


def _size(value: Any, kind: type[dict[str, Any]] | type[list[Any]]) -> int:
    return len(value) if isinstance(value, kind) else 0
