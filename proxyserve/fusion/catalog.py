"""What rules can refer to: the models, the presets and the calibrations of a server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proxyserve.errors import ExpertParked, InvalidRequest, UnknownModel
from proxyserve.fusion.calibration import Calibration
from proxyserve.fusion.program import BASE_LANE
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.model_set import ModelSet
from proxyserve.models.remote import AnyModel

if TYPE_CHECKING:
    from proxyserve.fusion.fusion import Fusion

_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, eq=False)
class Catalog:
    """Names and what they stand for. `calibrations` are keyed by expert."""

    models: ModelSet
    presets: Mapping[str, Fusion] = field(default_factory=dict)
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)

    def pair(self, expert: str) -> tuple[str, str]:
        """Names of the expert's two lanes. Raises UnknownModel, and InvalidRequest if it has no untuned model."""
        where = f"fusion.experts.{expert}"
        if self.models.expert(expert, param=where).untuned is None:
            raise InvalidRequest(
                f"Expert '{expert}' was loaded without an untuned model, which this rule needs; rule 'arm' does not.",
                param=where,
            )
        return f"{expert}.tuned", f"{expert}.untuned"

    def tuned(self, expert: str) -> str:
        """Name of the lane of the expert's tuned model. Raises UnknownModel."""
        self.models.expert(expert, param=f"fusion.experts.{expert}")
        return f"{expert}.tuned"

    def lane(self, name: str, param: str) -> str:
        """The lane that `name` means: `base` (or the base's own name), `EXPERT.tuned`, `EXPERT.untuned` or an untuned
        model's own name (which several experts may share), each with or without `@VARIANT`. Raises UnknownModel, naming
        the field `param`, and ExpertParked."""
        model, at, variant = name.partition("@")
        if at and not _VARIANT.fullmatch(variant):
            raise InvalidRequest(
                f"'{name}': after '@' comes the name of a prompt, made of letters, digits, '_' and '-'.",
                param=param,
            )
        canonical = self._canonical(model)
        if canonical is None:
            raise UnknownModel(
                f"There is no model '{model}' here; use {BASE_LANE}, EXPERT.tuned, EXPERT.untuned or the name of an "
                "expert's untuned model.",
                param=param,
            )
        return f"{canonical}{at}{variant}"

    def _canonical(self, model: str) -> str | None:
        if model in (BASE_LANE, self.models.base.name):
            return BASE_LANE
        expert, _, role = model.partition(".")
        found = self.models.experts.get(expert)
        if found is None and role in ("tuned", "untuned") and expert in self.models.parked:
            raise ExpertParked(expert)
        if found is not None and (role == "tuned" or (role == "untuned" and found.untuned is not None)):
            return model
        if self._untuned(model) is not None:
            return model
        for name, parked in self.models.parked.items():
            if parked.untuned == model:
                raise ExpertParked(name)
        return None

    def _untuned(self, name: str) -> LoadedModel | None:
        """The untuned model of that name, whichever experts have it."""
        for expert in self.models.experts.values():
            if expert.untuned is not None and expert.untuned.name == name:
                return expert.untuned
        return None

    def model(self, lane: str) -> AnyModel:
        """The model of a lane that `lane` or a rule has named."""
        model = lane.partition("@")[0]
        if model == BASE_LANE:
            return self.models.base
        name, _, role = model.partition(".")
        expert = self.models.experts.get(name)
        if expert is not None and role:
            found = expert.tuned if role == "tuned" else expert.untuned
        else:
            found = self._untuned(model)
        if found is None:
            raise ValueError(f"lane {lane} has no model")
        return found
