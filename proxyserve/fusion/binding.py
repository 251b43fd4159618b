"""From a program over names to one over models: which lanes to run, on which prompts, and where each term reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.program import BASE_LANE, FUSED_LAW, Program, WeightLaw
from proxyserve.fusion.weights import Schedule, factor_at
from proxyserve.models.remote import AnyModel, RemoteModel
from proxyserve.models.vocabulary import SharedVocabulary


@dataclass(frozen=True, slots=True)
class LaneSpec:
    """One lane to run: a model on a prompt. `names` are the roles it plays (`base`, `qa.untuned`, …)."""

    model: AnyModel
    prompt: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BoundTerm:
    """`weight * (lane - minus)`; the numbers index the request's lanes. `expert` is whose models it has, if any's."""

    lane: int
    minus: int | None
    weight: float
    schedule: Schedule
    expert: str | None

    def weight_at(self, token: int) -> float:
        """Its weight at generated token number `token`."""
        return self.weight * factor_at(self.schedule, token)


@dataclass(frozen=True, slots=True)
class BoundSupport:
    """`program.SupportMask` with lane numbers in `of`; None is the fused law."""

    of: tuple[int | None, ...]
    top_k: int
    top_p: float
    min_p: float
    removes: bool


@dataclass(frozen=True, slots=True)
class BoundProgram:
    """The compiled fusion of one request. `program` is what it was bound from. `lanes` has the base first if it runs;
    `origin` and `base` number lanes, `base` is None if no lane is the base on the request's own prompt. `normalise`:
    terms are made of log-softmaxed rows. `vocabulary` are the ids that all its models share."""

    program: Program
    lanes: tuple[LaneSpec, ...]
    origin: int
    base: int | None
    terms: tuple[BoundTerm, ...]
    support: BoundSupport | None
    normalise: bool
    vocabulary: SharedVocabulary
    lane_of: dict[str, int]

    @property
    def law(self) -> WeightLaw | None:
        """How weights are solved, if they are."""
        return self.program.law

    @property
    def remote_weights(self) -> dict[int, float]:
        """What the laws of remote lanes count in the scores, by lane, schedules left aside; lanes that only run to be
        reported on have no entry."""
        weights = {self.origin: self.program.origin_weight}
        for term in self.terms:
            weights[term.lane] = weights.get(term.lane, 0.0) + term.weight
            if term.minus is not None:
                weights[term.minus] = weights.get(term.minus, 0.0) - term.weight
        return {
            lane: weight
            for lane, weight in weights.items()
            if isinstance(self.lanes[lane].model, RemoteModel)
        }

    def by_expert(
        self, weights: Sequence[float], logprobs: Mapping[int, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Per expert, the weight of its terms and what they add to the score of one token, in nats. `weights` are those
        of the terms, `logprobs` the token's under each lane's law, by lane number."""
        used: dict[str, float] = {}
        push: dict[str, float] = {}
        for term, weight in zip(self.terms, weights, strict=True):
            if term.expert is None:
                continue
            difference = logprobs[term.lane] - (0.0 if term.minus is None else logprobs[term.minus])
            if self.program.one_sided:
                difference = max(0.0, difference)
            used[term.expert] = used.get(term.expert, 0.0) + weight
            push[term.expert] = push.get(term.expert, 0.0) + weight * difference
        return used, push

    @property
    def is_linear(self) -> bool:
        """Whether it is nothing but the origin and pairs on top."""
        program = self.program
        return (
            program.origin_weight == 1.0
            and program.power is None
            and not program.one_sided
            and self.support is None
            and self.base in (self.origin, None)
        )


def bind(
    program: Program,
    catalog: Catalog,
    prompt_of: Callable[[str], tuple[int, ...]],
    *,
    watched: tuple[str, ...] = (),
) -> BoundProgram:
    """Give every lane its model and its prompt. Lanes of the same model on the same prompt are run once (experts that
    share their untuned model, or whose untuned model is the base). `watched` are lanes that run to be reported on."""
    lanes: list[LaneSpec] = []
    index_of: dict[tuple[object, tuple[int, ...]], int] = {}
    lane_of: dict[str, int] = {}
    wanted = dict.fromkeys((*program.lanes, *watched))
    for name in sorted(wanted, key=lambda name: name != BASE_LANE):
        model, prompt = catalog.model(name), prompt_of(name)
        index = index_of.setdefault((model.key, prompt), len(lanes))
        if index == len(lanes):
            lanes.append(LaneSpec(model, prompt, (name,)))
        else:
            same = lanes[index]
            lanes[index] = LaneSpec(same.model, same.prompt, (*same.names, name))
        lane_of[name] = index
    vocabulary = catalog.models.base.vocabulary
    for spec in lanes:
        vocabulary = vocabulary.intersect(spec.model.vocabulary)
    terms = tuple(
        BoundTerm(
            lane_of[term.lane],
            None if term.minus is None else lane_of[term.minus],
            term.weight,
            term.schedule,
            _expert_of(term.lane) or _expert_of(term.minus or ""),
        )
        for term in program.active_terms
    )
    support = program.support
    return BoundProgram(
        program=program,
        lanes=tuple(lanes),
        origin=lane_of[program.origin],
        base=lane_of.get(BASE_LANE),
        terms=terms,
        support=None
        if support is None
        else BoundSupport(
            tuple(None if name == FUSED_LAW else lane_of[name] for name in support.of),
            support.top_k,
            support.top_p,
            support.min_p,
            support.outside == "mask",
        ),
        # Outside the support the origin stands without the terms, so a constant in a term would count.
        normalise=support is not None and support.outside == "base",
        vocabulary=vocabulary,
        lane_of=lane_of,
    )


def _expert_of(lane: str) -> str | None:
    expert, dot, _ = lane.partition("@")[0].partition(".")
    return expert if dot else None
