"""What a fusion compiles to: lanes to run, and which of them make which delta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proxyserve.errors import InvalidRequest
from proxyserve.fusion.spec import Fusion
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.model_set import ModelSet
from proxyserve.models.vocabulary import SharedVocabulary

BASE_LANE = "base"


@dataclass(frozen=True, slots=True)
class LaneSpec:
    """One lane to run: a model on a prompt. `names` are the roles it plays (`base`, `qa.untuned`, …)."""

    model: LoadedModel
    prompt: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LaneTerm:
    """`weight * (lane[tuned] - lane[untuned])`; the numbers index the request's lanes, 0 is the base."""

    tuned: int
    untuned: int
    weight: float


@dataclass(frozen=True, slots=True)
class FusionProgram:
    """The compiled fusion of one request. `vocabulary` are the ids that all its models share."""

    lanes: tuple[LaneSpec, ...]
    terms: tuple[LaneTerm, ...]
    vocabulary: SharedVocabulary


def compile_fusion(
    fusion: Fusion, models: ModelSet, prompt_of: Callable[[str], tuple[int, ...]]
) -> FusionProgram:
    """Turn rule `proxy` into lanes and terms.

    Lanes of the same model on the same prompt are run once (experts that share their untuned model, or whose untuned
    model is the base). Experts of weight 0 get no lanes. Raises UnknownModel for an expert that is not there and
    InvalidRequest for one without an untuned model.
    """
    lanes: list[LaneSpec] = []
    index_of: dict[tuple[object, tuple[int, ...]], int] = {}

    def lane(model: LoadedModel, name: str) -> int:
        prompt = prompt_of(name)
        index = index_of.setdefault((model.key, prompt), len(lanes))
        if index == len(lanes):
            lanes.append(LaneSpec(model, prompt, (name,)))
        else:
            same = lanes[index]
            lanes[index] = LaneSpec(same.model, same.prompt, (*same.names, name))
        return index

    lane(models.base, BASE_LANE)
    vocabulary = models.base.vocabulary
    terms = []
    for entry in fusion.experts:
        expert = models.expert(entry.expert)
        if entry.weight == 0.0:
            continue
        if expert.untuned is None:
            raise InvalidRequest(
                f"Expert '{expert.name}' was loaded without an untuned model, which rule 'proxy' needs.",
                param=f"fusion.experts.{expert.name}",
            )
        tuned = lane(expert.tuned, f"{expert.name}.tuned")
        untuned = lane(expert.untuned, f"{expert.name}.untuned")
        terms.append(LaneTerm(tuned, untuned, entry.weight))
        vocabulary = vocabulary.intersect(expert.vocabulary)
    return FusionProgram(tuple(lanes), tuple(terms), vocabulary)
