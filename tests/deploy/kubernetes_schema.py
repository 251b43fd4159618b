"""Manifests against the API of Kubernetes 1.37, as the package lightkube-models has it: a class for each object, made
from the API's own description.

Checked are names of fields, types, and required fields, at every depth. Not checked are values of strings (the package
has no enums) and objects of operators (ServiceMonitor, PrometheusRule, ScaledObject), which the package does not have.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from functools import cache
from importlib import import_module
from typing import Any


@cache
def _module(name: str) -> types.ModuleType:
    """`apps_v1` and the like. The classes expect a base class and decorators of a client, which is not needed here."""
    core, schema = types.ModuleType("lightkube.core"), types.ModuleType("lightkube.core.schema")
    vars(schema).update(dataclass=dataclasses.dataclass, field=dataclasses.field, DictMixin=object)
    sys.modules.setdefault("lightkube.core", core)
    sys.modules.setdefault("lightkube.core.schema", schema)
    return import_module(f"lightkube.models.{name}")


def class_of(manifest: dict[str, Any]) -> type:
    """Raises AttributeError or ImportError for an object that Kubernetes does not have."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    kind: type = getattr(_module(f"{group.split('.')[0] or 'core'}_{version}"), manifest["kind"])
    return kind


def complaints(value: Any, expected: Any, where: str = "") -> list[str]:
    """What is wrong with `value` as an `expected`, as paths and reasons. A field that is `null` counts as left out."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return []
    if origin in (typing.Union, types.UnionType):
        tried = [complaints(value, choice, where) for choice in arguments if choice is not type(None)]
        return [] if [] in tried else tried[0]
    if origin in (list, typing.List):  # noqa: UP006  how the package writes it
        if not isinstance(value, list):
            return [f"{where}: not a list"]
        return [c for i, entry in enumerate(value) for c in complaints(entry, arguments[0], f"{where}[{i}]")]
    if origin in (dict, typing.Dict):  # noqa: UP006
        if not isinstance(value, dict):
            return [f"{where}: not a map"]
        return [c for key, entry in value.items() for c in complaints(entry, arguments[1], f"{where}.{key}")]
    if dataclasses.is_dataclass(expected):
        return _complaints_of_object(value, typing.cast(type, expected), where)
    accepted = (int, float) if expected is float else expected
    if isinstance(value, accepted) and not (isinstance(value, bool) and expected is not bool):
        return []
    return [f"{where}: {value!r} is no {getattr(expected, '__name__', expected)}"]


def _complaints_of_object(value: Any, kind: type, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: not a {kind.__name__}"]
    hints = typing.get_type_hints(kind)
    fields = {field.metadata.get("json", field.name): field for field in dataclasses.fields(kind)}
    found = [f"{where}.{name}: no such field in {kind.__name__}" for name in value if name not in fields]
    for name, field in fields.items():
        if value.get(name) is not None:
            found += complaints(value[name], hints[field.name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING:
            found.append(f"{where}.{name}: is required")
    return found
