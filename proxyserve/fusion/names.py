"""A catalog of names alone: enough to compile a fusion, nothing to run it with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from proxyserve.errors import UnknownModel
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import Fusion
from proxyserve.models.loaded_model import ParkedExpert
from proxyserve.models.model_set import ModelSet


@dataclass(frozen=True, slots=True)
class _Named:
    name: str


@dataclass(frozen=True, slots=True)
class _NamedPair:
    untuned: _Named | None


@dataclass(frozen=True, slots=True)
class _Names:
    base: _Named
    experts: Mapping[str, _NamedPair]
    parked: Mapping[str, ParkedExpert]

    def expert(self, name: str, *, param: str) -> _NamedPair:
        if name not in self.experts:
            raise UnknownModel(f"There is no expert '{name}' here.", param=param)
        return self.experts[name]


def catalog_of_names(
    base: str, untuned: Mapping[str, str | None], presets: Mapping[str, Fusion] | None = None
) -> Catalog:
    """`untuned` maps experts to their untuned model's name, None for those without one. Rules compile over this catalog
    as over a real one; its models cannot be loaded or run."""
    pairs = {name: _NamedPair(None if other is None else _Named(other)) for name, other in untuned.items()}
    # Compiling asks models for their names only.
    models = cast(ModelSet, _Names(_Named(base), MappingProxyType(pairs), MappingProxyType({})))
    return Catalog(models, dict(presets or {}))
