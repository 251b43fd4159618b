"""Presets that come and go while the server runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from proxyserve.engine.engine import Engine
from proxyserve.engine.offer import Offer
from proxyserve.engine.preparation import check_presets
from proxyserve.errors import InvalidRequest, SwapConflict, UnknownModel
from proxyserve.experts.audit import AuditLog
from proxyserve.experts.roster import Roster
from proxyserve.experts.store import StateStore
from proxyserve.fusion.fusion import Fusion
from proxyserve.types import NAME

PresetValues = Mapping[str, Mapping[str, Any]]


class PresetBook:
    """All presets as JSON values, as they were given. Those of the command line are `fixed`: they would be back at the
    next start, whatever was done to them. `parse` makes a fusion of a value, or raises InvalidRequest."""

    def __init__(
        self,
        engine: Engine,
        roster: Roster,
        store: StateStore,
        audit: AuditLog,
        parse: Callable[[Mapping[str, Any]], Fusion],
    ) -> None:
        self._engine = engine
        self._roster = roster
        self._store = store
        self._audit = audit
        self._parse = parse
        self._fixed: PresetValues = {}
        self._values: dict[str, Mapping[str, Any]] = {}

    def install(self, fixed: PresetValues, values: PresetValues) -> None:
        """Take over what the engine began with."""
        self._fixed, self._values = dict(fixed), dict(values)

    @property
    def values(self) -> PresetValues:
        with self._roster.lock:
            return {**self._values, **self._fixed}

    def put(self, name: str, value: Mapping[str, Any], *, actor: str) -> None:
        """Raises InvalidRequest and SwapConflict."""
        if not NAME.fullmatch(name) or name == "base":
            raise InvalidRequest(
                f"'{name[:100]}' cannot name a preset; use letters, digits, '_' and '-', at most 64.",
                param="name",
            )
        fusion = self._parse(value)
        with self._roster.lock:
            self._require_free(name)
            if name == self._engine.models.base.name or name in self._roster.entries:
                raise SwapConflict(
                    f"'{name}' is the name of a model; call the preset something else.", code="name_taken"
                )
            offer = self._offer({**self._engine.catalog.presets, name: fusion})
            what = json.dumps({name: value})
            self._audit.record("put_preset", actor=actor, outcome="begun", detail=what)
            self._store.put_preset(name, value)
            self._values[name] = value
            self._engine.offers.replace(offer)
            self._audit.conclude("put_preset", actor=actor, outcome="done", detail=name)

    def delete(self, name: str, *, actor: str) -> None:
        """Raises UnknownModel, and SwapConflict if another preset is made of it."""
        with self._roster.lock:
            self._require_free(name)
            if name not in self._values:
                raise UnknownModel(f"There is no preset '{name}' here.", param="name")
            presets = self._engine.catalog.presets
            try:
                offer = self._offer({other: presets[other] for other in presets if other != name})
            except InvalidRequest as error:
                raise SwapConflict(f"{error.message} Delete that preset first.", code="in_use") from None
            self._audit.record("delete_preset", actor=actor, outcome="begun", detail=name)
            self._store.delete_preset(name)
            del self._values[name]
            self._engine.offers.replace(offer)
            self._audit.conclude("delete_preset", actor=actor, outcome="done", detail=name)

    def _require_free(self, name: str) -> None:
        if name in self._fixed:
            raise SwapConflict(
                f"Preset '{name}' is from the server's command line (--preset), and would be back at its next start.",
                code="in_use",
            )

    def _offer(self, presets: Mapping[str, Fusion]) -> Offer:
        """Raises InvalidRequest if one of them cannot work."""
        current = self._engine.offers.current
        offer = Offer(replace(current.catalog, presets=presets), current.policy)
        check_presets(offer)
        return offer
