"""The base and the experts that a server has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from proxyserve.errors import ExpertParked, LoadError, UnknownModel
from proxyserve.models.loaded_model import Expert, LoadedModel, ParkedExpert
from proxyserve.models.remote import AnyModel
from proxyserve.models.vocabulary import require_compatible
from proxyserve.types import NAME, ModelKey


class ModelSet:
    """The base and its experts, checked against each other. Immutable. `parked` are names of experts that are served
    here, but are not in memory now."""

    def __init__(
        self,
        base: AnyModel,
        experts: Iterable[Expert] = (),
        *,
        parked: Mapping[str, ParkedExpert] | None = None,
    ) -> None:
        self.base = base
        self.parked: Mapping[str, ParkedExpert] = MappingProxyType(dict(parked or {}))
        by_name: dict[str, Expert] = {}
        for expert in experts:
            if expert.name in by_name:
                raise LoadError(f"expert '{expert.name}' is given twice; give each expert its own name")
            if expert.name in ("base", base.name):
                raise LoadError(f"an expert cannot be called '{expert.name}', that names the base")
            by_name[expert.name] = expert
        self.experts: Mapping[str, Expert] = MappingProxyType(by_name)

    def expert(self, name: str, *, param: str = "fusion.experts") -> Expert:
        """Raises UnknownModel, and ExpertParked for one that must be loaded first."""
        expert = self.experts.get(name)
        if expert is None:
            if name in self.parked:
                raise ExpertParked(name)
            # Which others there are is not for every caller.
            raise UnknownModel(
                f"There is no expert '{name}' here; GET /v1/models lists those that the key may use.",
                param=param,
            )
        return expert

    @property
    def trunks(self) -> Mapping[ModelKey, AnyModel]:
        """Every distinct set of weights once, base first."""
        return {model.trunk.key: model.trunk for model in self.models.values()}

    @property
    def models(self) -> Mapping[ModelKey, AnyModel]:
        """Every distinct model once, base first."""
        found: dict[ModelKey, AnyModel] = {self.base.key: self.base}
        for expert in self.experts.values():
            for model in (expert.tuned, expert.untuned):
                if model is not None:
                    found.setdefault(model.key, model)
        return found


def make_expert(
    name: str,
    base: AnyModel,
    tuned: LoadedModel,
    untuned: LoadedModel | None,
    *,
    generation: int = 1,
    protected: bool = False,
) -> Expert:
    """Pair tuned and untuned after checking their tokenizers against the base's. Raises LoadError."""
    if not NAME.fullmatch(name):
        raise LoadError(f"'{name}' is no expert name; use letters, digits, '_' and '-', at most 64")
    vocabulary = base.vocabulary
    for model in (tuned, untuned):
        if model is not None and model is not base:
            require_compatible(base.tokenizer.token_to_id, base.name, model.tokenizer.token_to_id, model.name)
            vocabulary = vocabulary.intersect(model.vocabulary)
    return Expert(name, tuned, untuned, vocabulary, generation, protected)
