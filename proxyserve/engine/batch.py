"""From the logits of one step to one call of the kernels, for a batch of unlike requests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from proxyserve.engine.choice import Choice
from proxyserve.engine.forward import Forward, Pair
from proxyserve.engine.residents import AnyRunner
from proxyserve.engine.runner import Runner
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.scheduler import LaneWork
from proxyserve.types import ModelKey, TokenLogprob
from proxyserve_kernels import (
    ABSENT,
    CLIP,
    FUSED,
    Adjustments,
    Backend,
    Logprobs,
    Match,
    PickControls,
    RowBatch,
    Rules,
    SolveControls,
    Supports,
)

_MATCHES = {
    "forward": Match.FORWARD,
    "reverse": Match.REVERSE,
    "both": Match.BOTH,
    "budget": Match.BUDGET,
    "paper": Match.PAPER,
}

#: (source, row) of a lane's logits.
Place = tuple[int, int]
_ABSENT: Place = (ABSENT, 0)
_NOWHERE: Mapping[int, Sequence[Place]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class FusedRow:
    """One row to fuse. `alone`: the base by itself, to see whether a gated request needs its other lanes. `nth` of the
    rows that each of the choice's lanes has in this step. `target` is the token of the prompt that the row is to score;
    None: a token is drawn from it, to follow the first `ahead` of the choice's drafts."""

    choice: Choice
    nth: int = 0
    alone: bool = False
    target: int | None = None
    ahead: int = 0

    @property
    def logprobs(self) -> int | None:
        """How many of the likeliest tokens the request wants to see here; None if it wants no log-probs."""
        sampling = self.choice.submission.sampling
        if self.target is not None:
            return sampling.prompt_logprobs
        return 0 if sampling.logprobs is None and sampling.logprob_token_ids else sampling.logprobs

    @property
    def number(self) -> int:
        """Of the token in the answer, which schedules of weights go by. A prompt's tokens from `prompt_logprobs_from`
        on are scored as the answer to those before; in a prompt that is scored whole, each as an answer's first."""
        scoring, start = self.choice.scoring, self.choice.submission.sampling.prompt_logprobs_from
        if self.target is None or scoring is None:
            return len(self.choice.output) + self.ahead
        return scoring.first + len(scoring.scores) + self.nth - start if start else 0


class LogitRows:
    """Where the logits of each lane's tokens lie: in what the models returned in this step, or, for the base of a
    request that awaits its other lanes, in what an earlier step kept. A lane's rows are neighbours; `nth` says which.
    Lanes of remote models have one, and another with the highest log-prob that each token can have. `drafted` are the
    logits that drafting left, and `places` where in them lie those of each drafter, by the lane's id; such a lane's
    last row alone is among the others."""

    def __init__(
        self,
        rows: Sequence[FusedRow],
        work: Mapping[ModelKey, Sequence[LaneWork]],
        forward: Forward,
        drafted: Sequence[Tensor] = (),
        places: Mapping[int, Sequence[Place]] = _NOWHERE,
    ) -> None:
        logits = forward.logits
        self._places: dict[int, Place] = {}
        self._pairs: dict[tuple[int, int], Place] = {}
        for source, model in enumerate(logits):
            pairs = [(id(plus), id(minus)) for plus, minus in forward.differences.get(model, ())]
            paired = {lane for pair in pairs for lane in pair}
            rows_of = {id(item.lane): item.rows for item in work[model] if item.rows}
            row = 0
            for lane, count in rows_of.items():
                if lane not in paired:
                    self._places[lane] = source, row
                    row += count
            for pair in pairs:
                self._pairs[pair] = source, row
                row += rows_of[pair[0]]
        held = [fused.choice for fused in rows if fused.choice.scheduled.awaiting]
        self._places.update(
            (id(choice.scheduled.lanes[0]), (len(logits), row)) for row, choice in enumerate(held)
        )
        kept = [choice.held for choice in held if choice.held is not None]
        sources = [*logits.values(), *([torch.cat(kept)] if kept else [])]
        self._highest: dict[int, Place] = {}
        self._unseen: dict[int, float] = {}
        for model, remote in forward.remote.items():
            asked = [id(item.lane) for item in work[model] if item.rows]
            for row, (lane, unseen) in enumerate(zip(asked, remote.unseen, strict=True)):
                self._highest[lane] = len(sources), row
                self._unseen[lane] = unseen
            sources.append(remote.highest)
        self._drafted: dict[int, list[Place]] = {}
        for lane, found in places.items():
            if lane in self._places:
                own = [(len(sources) + source, row) for source, row in found]
                self._drafted[lane] = [*own, self._places[lane]]
        self.sources = (*sources, *drafted)

    def place(self, lane: Lane, nth: int = 0) -> Place:
        drafted = self._drafted.get(id(lane))
        return _further(self._places[id(lane)], nth) if drafted is None else drafted[nth]

    def term(self, lane: Lane, minus: Lane | None, nth: int) -> tuple[Place, Place]:
        """Where `lane - minus` of a term is read: from two rows, or from one that holds their difference."""
        if minus is None:
            return self.highest(lane, nth), _ABSENT
        difference = self._pairs.get((id(lane), id(minus)))
        if difference is not None:
            return _further(difference, nth), _ABSENT
        return self.highest(lane, nth), self.highest(minus, nth)

    def highest(self, lane: Lane, nth: int) -> Place:
        """The row of what each token has at most; for lanes of local models their logits, which are exact."""
        return self._highest.get(id(lane)) or self.place(lane, nth)

    def returned(self, lane: Lane, token: int) -> bool:
        """Whether the lane's model gave `token` a log-prob."""
        source, row = self.place(lane)
        return bool(self.sources[source][row, token] > -math.inf)

    def unseen(self, lane: Lane) -> float:
        """The probability of all that a remote lane's server did not return; 0 for other lanes."""
        return self._unseen.get(id(lane), 0.0)

    def row(self, lane: Lane) -> Tensor:
        """The lane's logits, [1, width], as a copy that outlives the step."""
        source, row = self.place(lane)
        return self.sources[source][row : row + 1].clone()


def _further(place: Place, nth: int) -> Place:
    source, row = place
    return source, row + nth


def shared_heads(
    rows: Sequence[FusedRow], runners: Mapping[ModelKey, AnyRunner]
) -> dict[ModelKey, list[Pair]]:
    """By trunk, the pairs of lanes of which only the difference is read. A drafter has been read by itself."""
    found: dict[ModelKey, list[Pair]] = {}
    for choice in dict.fromkeys(row.choice for row in rows if not row.alone):
        if choice.scheduled.drafts or (choice.ahead is not None and choice.ahead.shadow):
            continue
        if choice.differences is None:
            choice.differences = _differences(choice, runners)
        for lane, minus in choice.differences:
            found.setdefault(lane.trunk, []).append((lane, minus))
    return found


def _differences(choice: Choice, runners: Mapping[ModelKey, AnyRunner]) -> list[Pair]:
    """Those of terms with one linear head, in sums that nothing else looks into."""
    program, lanes, fusion = choice.program, choice.scheduled.lanes, choice.submission.fusion
    if fusion.explain or fusion.gate is not None:
        return []
    if not program.is_linear or program.law is not None or program.remote_weights:
        return []
    pairs = [(term.lane, term.minus) for term in program.terms]
    # A lane that is read by itself anywhere has its own row; a pair with such a lane saves none.
    alone = {program.origin}
    while True:
        shared = [
            (lane, minus)
            for lane, minus in pairs
            if minus is not None
            and alone.isdisjoint((lane, minus))
            and _one_head(lanes[lane], lanes[minus], runners)
        ]
        rest = {number for pair in pairs if pair not in shared for number in pair if number is not None}
        if rest <= alone:
            return [(lanes[lane], lanes[minus]) for lane, minus in shared]
        alone |= rest


def _one_head(lane: Lane, minus: Lane, runners: Mapping[ModelKey, AnyRunner]) -> bool:
    runner = runners[lane.trunk]
    return lane.trunk == minus.trunk and isinstance(runner, Runner) and runner.head_is_linear


def build_batch(rows: Sequence[FusedRow], logits: LogitRows, *, highest: bool = False) -> RowBatch:
    """Which rows of `logits` make up each fused row, and how. A remote origin rules out what its server did not return;
    with `highest` it gives that, as remote lanes in terms always do, the most that it can have."""
    most = max(0 if row.alone else len(row.choice.program.terms) for row in rows)
    unused = [_ABSENT]
    base, positive, negative, weights = [], [], [], []
    for row in rows:
        program, lanes = row.choice.program, row.choice.scheduled.lanes
        terms = () if row.alone else program.terms
        rest = most - len(terms)
        origin = lanes[0 if row.alone else program.origin]
        base.append(logits.highest(origin, row.nth) if highest else logits.place(origin, row.nth))
        places = [
            logits.term(lanes[term.lane], None if term.minus is None else lanes[term.minus], row.nth)
            for term in terms
        ]
        positive.append([*(plus for plus, _ in places), *unused * rest])
        negative.append([*(minus for _, minus in places), *unused * rest])
        number = row.number
        weights.append([*(term.weight_at(number) for term in terms), *[0.0] * rest])
    B = len(rows)
    plain = all(row.alone or row.choice.program.is_linear for row in rows)
    return RowBatch(
        sources=logits.sources,
        base=_ints(base),
        widths=_ints([row.choice.vocabulary.size for row in rows]),
        positive=_ints(positive).view(B, most, 2),
        negative=_ints(negative).view(B, most, 2),
        weights=_floats(weights).view(B, most),
        rules=None if plain else _rules(rows, logits, base),
    )


def models_are_sound(batch: RowBatch, number: int) -> bool:
    """Whether all scores that row `number` is made of are those of laws: no NaN, no +inf, and some token possible. If
    the fused row is none all the same, then the request's own numbers are why."""
    width = int(batch.widths[number])
    places = [*batch.positive[number].tolist(), *batch.negative[number].tolist(), batch.base[number].tolist()]
    # The largest of a row with a NaN is NaN.
    return all(
        math.isfinite(batch.sources[source][row, :width].max()) for source, row in places if source != ABSENT
    )


def _rules(rows: Sequence[FusedRow], logits: LogitRows, bases: Sequence[Place]) -> Rules:
    """What is not linear. Rows without rules get the values that change nothing."""
    base_weight, power, one_sided, normalise, reference = [], [], [], [], []
    for row, base in zip(rows, bases, strict=True):
        bound = row.choice.program
        program = None if row.alone else bound.program
        base_weight.append(1.0 if program is None else program.origin_weight)
        power.append(math.nan if program is None or program.power is None else program.power)
        one_sided.append(program is not None and program.one_sided)
        normalise.append(program is not None and bound.normalise)
        reference.append(
            base
            if row.alone or bound.base is None
            else logits.place(row.choice.scheduled.lanes[bound.base], row.nth)
        )
    return Rules(
        base_weight=_floats(base_weight),
        power=_floats(power),
        one_sided=torch.tensor(one_sided),
        normalise=torch.tensor(normalise),
        clip=torch.full((len(rows),), CLIP, dtype=torch.float32),
        reference=_ints(reference),
        supports=_supports(rows, logits),
    )


def _supports(rows: Sequence[FusedRow], logits: LogitRows) -> Supports | None:
    supports = [None if row.alone else row.choice.program.support for row in rows]
    most = max(0 if support is None else len(support.of) for support in supports)
    if most == 0:
        return None
    of: list[list[Place]] = []
    for row, support in zip(rows, supports, strict=True):
        lanes = row.choice.scheduled.lanes
        laws: list[Place] = []
        if support is not None:
            laws = [(FUSED, 0) if lane is None else logits.place(lanes[lane], row.nth) for lane in support.of]
        of.append([*laws, *[(ABSENT, 0)] * (most - len(laws))])
    return Supports(
        of=_ints(of).view(len(rows), most, 2),
        top_k=_ints([0 if support is None else support.top_k for support in supports]),
        top_p=_floats([1.0 if support is None else support.top_p for support in supports]),
        min_p=_floats([0.0 if support is None else support.min_p for support in supports]),
        removes=torch.tensor([support is None or support.removes for support in supports]),
    )


def with_solved_weights(backend: Backend, rows: Sequence[FusedRow], batch: RowBatch) -> RowBatch:
    """`batch`, made of `rows`, with the weights that are solved at each position."""
    controls = _build_solve(rows)
    return batch if controls is None else batch.with_weights(backend.solve(batch, controls).weights)


def _build_solve(rows: Sequence[FusedRow]) -> SolveControls | None:
    """How the rows' weights are solved; None if no row's are."""
    laws = [None if row.alone else row.choice.program.law for row in rows]
    if not any(laws):
        return None
    return SolveControls(
        match=_ints([Match.NONE if law is None else _MATCHES[law.match] for law in laws]),
        max_weight=_floats([1.0 if law is None else law.max_weight for law in laws]),
        budget=_floats([0.0 if law is None else law.kl for law in laws]),
    )


def target_entropies(rows: Sequence[FusedRow]) -> Tensor | None:
    """float32 [rows] in nats, NaN for rows that have no target; None if no row has one."""
    targets = [row.choice.submission.fusion.target_entropy for row in rows]
    if all(target is None for target in targets):
        return None
    return _floats([math.nan if target is None else target for target in targets])


def build_controls(
    rows: Sequence[FusedRow], temperatures: Tensor | None, adjustments: Adjustments | None
) -> PickControls:
    """How each row's token is chosen, and what is told of it; arguments as in `build_drawing`."""
    return replace(
        build_drawing(rows, temperatures, adjustments),
        raw=[_listed(row) for row in rows],
        listed=listed_tokens(rows),
        compare=True,
    )


def build_drawing(
    rows: Sequence[FusedRow], temperatures: Tensor | None, adjustments: Adjustments | None
) -> PickControls:
    """How each row's token is chosen. `temperatures` float32 [rows] replace those of the requests where not NaN."""
    choices = [row.choice for row in rows]
    sampling = [choice.submission.sampling for choice in choices]
    temperature = _floats([params.temperature for params in sampling])
    if temperatures is not None:
        temperature = torch.where(temperatures.isnan(), temperature, temperatures)
    return PickControls(
        temperature=temperature,
        top_k=_ints([params.top_k for params in sampling]),
        top_p=_floats([params.top_p for params in sampling]),
        min_p=_floats([params.min_p for params in sampling]),
        seeds=_ints([choice.seed for choice in choices]),
        positions=_ints([row.choice.position + row.ahead for row in rows]),
        raw=(None,) * len(rows),
        adjustments=adjustments,
        compare=False,
    )


def build_scoring(rows: Sequence[FusedRow]) -> PickControls:
    """What is asked about the rows' targets. Nothing is drawn, and nothing but the fused law counts."""
    return replace(
        PickControls.greedy(len(rows)),
        raw=[_listed(row) for row in rows],
        forced=_ints([row.target for row in rows]),
        listed=listed_tokens(rows),
        compare=any(row.choice.submission.fusion.explain for row in rows),
    )


def _listed(row: FusedRow) -> int | None:
    """How many of the likeliest tokens somebody wants to see; None if nobody wants log-probs."""
    wishes = [row.logprobs]
    if row.choice.submission.fusion.explain:
        wishes.append(row.choice.submission.fusion.explain)
    if row.alone:
        wishes.append(1)
    return max((wish for wish in wishes if wish is not None), default=None)


def listed_tokens(rows: Sequence[FusedRow]) -> Tensor | None:
    """Ids that requests name, int64 [rows, most], -1 where there is none; None if no row has any."""
    named = [row.choice.submission.sampling.logprob_token_ids for row in rows]
    most = max(map(len, named))
    if most == 0:
        return None
    return _ints([(*ids, *(-1,) * (most - len(ids))) for ids in named])


def token_logprobs(
    tokens: Sequence[int], logprobs: Logprobs | None, listed: Tensor | None = None
) -> list[TokenLogprob | None]:
    """The kernels' report in the API's type, as long as any row wanted it. Ids that cannot be are left out of the
    likeliest. `listed` int64 [rows, m], as in the controls."""
    if logprobs is None:
        return [None] * len(tokens)
    entries: list[TokenLogprob | None] = []
    chosen, ranks = logprobs.chosen.tolist(), logprobs.ranks.tolist()
    tops = map(_pairs, logprobs.ids.tolist(), logprobs.values.tolist())
    for token, value, before, top in zip(tokens, chosen, ranks, tops, strict=True):
        entries.append(TokenLogprob(token, value, top, rank=None if before < 0 else before + 1))
    if listed is None or logprobs.listed is None:
        return entries
    named = zip(entries, listed.tolist(), logprobs.listed.tolist(), strict=True)
    return [entry and replace(entry, listed=_pairs(ids, values)) for entry, ids, values in named]


def _pairs(ids: Sequence[int], values: Sequence[float]) -> tuple[tuple[int, float], ...]:
    return tuple(pair for pair in zip(ids, values, strict=True) if pair[0] >= 0)


def wanted(row: FusedRow, law: TokenLogprob | None) -> TokenLogprob | None:
    """The log-probs that the request asked for; more may have been listed for other ends."""
    return None if law is None or row.logprobs is None else replace(law, top=law.top[: row.logprobs])


def is_sure(choice: Choice, law: TokenLogprob | None) -> bool:
    """Whether the base alone gives its best token at least the gate's probability."""
    gate = choice.submission.fusion.gate
    if gate is None or law is None or not law.top:
        return False
    return math.exp(law.top[0][1]) >= gate.confidence


def weights_used(row: FusedRow, solved: Sequence[float]) -> tuple[float, ...]:
    """Of the program's terms in this row; `solved` are those of the batch, rounded to float32."""
    program = row.choice.program
    if row.alone:
        return ()
    if program.law is not None:
        return tuple(solved[: len(program.terms)])
    number = row.number
    return tuple(term.weight_at(number) for term in program.terms)


def _ints(values: Iterable[object]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _floats(values: Iterable[object]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32)
