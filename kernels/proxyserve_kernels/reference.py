"""The slow, obvious twin: one row at a time, float64, everything sorted. Tests compare both backends with it.

Every function takes a batch and the number of a row, or plain tensors [V]; results are float64 on the host, cut at the
row's own width. A row that holds a NaN or +inf gives NaN somewhere; callers keep such rows away from the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from proxyserve_kernels.controls import Adjustments, PickControls
from proxyserve_kernels.philox import (
    STREAM_ACCEPT,
    STREAM_BLOCK,
    STREAM_RESIDUAL_BLOCK,
    STREAM_RESIDUAL_TOKEN,
    STREAM_TOKEN,
    gumbel,
    uniform,
)
from proxyserve_kernels.rows import ABSENT, BLOCK, FUSED, Ref, Row, RowBatch, Support, Term
from proxyserve_kernels.speculation import Drafts, VerifyRule
from proxyserve_kernels.tilt import Match, SolveControls

TOKEN_STREAMS = (STREAM_BLOCK, STREAM_TOKEN)
RESIDUAL_STREAMS = (STREAM_RESIDUAL_BLOCK, STREAM_RESIDUAL_TOKEN)

#: Points of the dense scan that brackets the least objective of Match.BOTH.
_SCAN = 4001


class TiltPoint(NamedTuple):
    """A(a) and its first three derivatives at one a."""

    log_partition: float
    mean: float
    variance: float
    third: float


class Divergences(NamedTuple):
    """Per term, float64 [T] in nats: KL(positive || negative) and KL(negative || positive)."""

    forward: Tensor
    reverse: Tensor


class RowMoments(NamedTuple):
    """A(w), float64 [T] gradient E_w[D], float64 [T, T] covariance Cov_w[D]."""

    log_partition: float
    gradient: Tensor
    covariance: Tensor


class RowSolution(NamedTuple):
    """One row of `tilt.Solution`; `weights` float64 [T]."""

    weights: Tensor
    multiplier: float
    forward: float
    reverse: float
    converged: bool


class Verdict(NamedTuple):
    """One request of `speculation.Verdicts`; `tokens` without the padding."""

    accepted: int
    tokens: list[int]


# Rows ---------------------------------------------------------------------------------------------------------------


def row_of(batch: RowBatch, row: int) -> Row:
    """Row number `row` spelled out, as `RowBatch.of` takes it."""
    weights = batch.weights[row].tolist()
    terms = []
    for positive, negative, weight in zip(
        batch.positive[row].tolist(), batch.negative[row].tolist(), weights, strict=True
    ):
        if positive[0] != ABSENT:
            terms.append(Term(Ref(*positive), Ref(*negative) if negative[0] != ABSENT else None, weight))
    plain = Row(Ref(*batch.base[row].tolist()), int(batch.widths[row]), tuple(terms))
    rules = batch.rules
    if rules is None:
        return plain
    power = float(rules.power[row])
    support = None
    if rules.supports is not None:
        entries = rules.supports.of[row].tolist()
        laws: tuple[Ref | Literal[-2], ...] = tuple(
            -2 if entry[0] == FUSED else Ref(*entry) for entry in entries if entry[0] != ABSENT
        )
        if laws:
            support = Support(
                laws,
                int(rules.supports.top_k[row]),
                float(rules.supports.top_p[row]),
                float(rules.supports.min_p[row]),
                "mask" if bool(rules.supports.removes[row]) else "base",
            )
    return plain._replace(
        base_weight=float(rules.base_weight[row]),
        power=None if math.isnan(power) else power,
        one_sided=bool(rules.one_sided[row]),
        normalise=bool(rules.normalise[row]),
        support=support,
        reference=Ref(*rules.reference[row].tolist()),
        clip=float(rules.clip[row]),
    )


def lane(batch: RowBatch, ref: Ref, width: int) -> Tensor:
    """The logits that `ref` names, float64 [width]."""
    return batch.sources[ref.source][ref.row, :width].cpu().double()


def log_softmax(scores: Tensor) -> Tensor:
    """`scores - log(sum(exp(scores)))`, float64 [V]; NaN throughout where every score is -inf."""
    return scores - torch.logsumexp(scores, dim=0)


def delta(batch: RowBatch, spec: Row, term: Term) -> Tensor:
    """positive - negative of one term without its weight, float64 [width].

    The rows are log-softmaxed first if the row is `normalise` or `one_sided`, and a one-sided delta is max(0, delta).
    Tokens at -inf: in both rows 0; in the positive only -clip; in the negative only +clip. A term without a negative
    is its positive row minus 0.
    """
    positive = lane(batch, term.positive, spec.width)
    negative = torch.zeros_like(positive) if term.negative is None else lane(batch, term.negative, spec.width)
    lost, gained = torch.isneginf(positive), torch.isneginf(negative)
    if spec.normalise or spec.one_sided:
        positive = log_softmax(positive)
        if term.negative is not None:
            negative = log_softmax(negative)
    difference = positive - negative
    difference[lost] = -spec.clip
    difference[gained] = spec.clip
    difference[lost & gained] = 0.0
    return difference.clamp(min=0.0) if spec.one_sided else difference


def linear(batch: RowBatch, spec: Row) -> Tensor:
    """`base_weight * base + sum of weight * delta`, float64 [width]; -inf where the base is."""
    base = lane(batch, spec.base, spec.width)
    scores = spec.base_weight * base
    for term in spec.terms:
        if term.weight != 0:
            scores = scores + term.weight * delta(batch, spec, term)
    scores[torch.isneginf(base)] = -math.inf
    return scores


def power_mean(batch: RowBatch, spec: Row) -> Tensor:
    """`(1 / r) log(sum over lanes of w_m * exp(r * l_m))`, float64 [width], l_m the log-softmax of lane m.

    Lanes are the base (weight `base_weight`) and the terms' positive rows; one without a weight above 0 is ignored.
    r = 0: `sum of w_m * l_m`; r = +inf and -inf: the largest and the smallest l_m.
    """
    r = spec.power
    assert r is not None
    named = [(spec.base_weight, spec.base), *((term.weight, term.positive) for term in spec.terms)]
    used = [(weight, log_softmax(lane(batch, ref, spec.width))) for weight, ref in named if weight > 0]
    if not used:
        return torch.full((spec.width,), -math.inf, dtype=torch.float64)
    laws = torch.stack([law for _, law in used])
    weights = torch.tensor([weight for weight, _ in used], dtype=torch.float64)[:, None]
    if r == 0:
        return (weights * laws).sum(dim=0)
    if r == math.inf:
        return laws.amax(dim=0)
    if r == -math.inf:
        return laws.amin(dim=0)
    mean = torch.logsumexp(r * laws + weights.log(), dim=0) / r
    if r < 0:
        mean[torch.isneginf(laws).any(dim=0)] = -math.inf
    return mean


def inside_support(batch: RowBatch, spec: Row, fused: Tensor) -> Tensor:
    """Tokens in the nucleus of at least one of the support's laws, bool [width]; `fused` are the unmasked scores."""
    assert spec.support is not None
    inside = torch.zeros(spec.width, dtype=torch.bool)
    for law in spec.support.of:
        scores = lane(batch, law, spec.width) if isinstance(law, Ref) else fused
        inside[kept_ids(scores, spec.support.top_k, spec.support.top_p, spec.support.min_p)] = True
    return inside


def fused_scores(batch: RowBatch, row: int) -> Tensor:
    """Fused scores before adjustments, float64 [width]: the sum or the power mean, then the support.

    Outside its support a token is -inf ("mask") or `base_weight * base` ("base").
    """
    spec = row_of(batch, row)
    scores = linear(batch, spec) if spec.power is None else power_mean(batch, spec)
    if spec.support is None:
        return scores
    if spec.support.outside == "mask":
        outside = torch.full_like(scores, -math.inf)
    else:
        outside = linear(batch, spec._replace(terms=()))
    kept = inside_support(batch, spec, scores) | scores.isnan()
    return torch.where(kept, scores, outside)


# Laws and draws -----------------------------------------------------------------------------------------------------


def adjusted(scores: Tensor, adjustments: Adjustments | None, row: int) -> Tensor:
    """`scores` float64 [width] of batch row `row` after logit bias, penalties and grammar mask; a new tensor."""
    scores = scores.clone()
    if adjustments is None:
        return scores
    for entry, owner in enumerate(adjustments.bias_rows.tolist()):
        if owner == row:
            scores[int(adjustments.bias_ids[entry])] += float(adjustments.bias_values[entry])
    for entry, owner in enumerate(adjustments.seen_rows.tolist()):
        if owner == row:
            token = int(adjustments.seen_ids[entry])
            count = float(adjustments.counts[entry])
            penalty = float(adjustments.repetition[entry])
            score = float(scores[token])
            score = score / penalty if score > 0 else score * penalty
            if count > 0:
                score -= float(adjustments.presence[entry]) + float(adjustments.frequency[entry]) * count
            scores[token] = score
    if adjustments.masks is not None and adjustments.mask_of is not None:
        mask = int(adjustments.mask_of[row])
        if mask >= 0:
            for token in range(len(scores)):
                if not allows(adjustments.masks[mask].tolist(), token):
                    scores[token] = -math.inf
    return scores


def allows(words: list[int], token: int) -> bool:
    """Whether a mask, given as its 32-bit words, allows `token`."""
    return token // 32 < len(words) and bool((words[token // 32] >> (token % 32)) & 1)


def removed_mass(batch: RowBatch, adjustments: Adjustments, row: int) -> float:
    """Probability, under the row's raw law, of the tokens that its `removed_by` mask rules out; 0 without one."""
    if adjustments.masks is None or adjustments.removed_by is None or int(adjustments.removed_by[row]) < 0:
        return 0.0
    words = adjustments.masks[int(adjustments.removed_by[row])].tolist()
    law = raw_law(batch, row).exp().tolist()
    return math.fsum(p for token, p in enumerate(law) if not allows(words, token))


def ordered_ids(scores: Tensor) -> list[int]:
    """All ids of `scores` [V] that are not -inf, best first, ties by id."""
    values = scores.tolist()
    possible = [token for token, value in enumerate(values) if value > -math.inf]
    return sorted(possible, key=lambda token: (-values[token], token))


def kept_ids(scores: Tensor, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Ids that min-p, then top-k, then top-p leave of `scores` [V] (after temperature), best first, ties by id. An id
    at -inf is never kept."""
    law = torch.softmax(scores.double(), dim=0).tolist()
    order = ordered_ids(scores)
    if not order:
        return []
    kept = [token for token in order if law[token] >= min_p * law[order[0]]]
    if top_k:
        kept = kept[:top_k]
    if top_p >= 1.0:
        return kept
    total, mass = sum(law[token] for token in kept), 0.0
    nucleus: list[int] = []
    for token in kept:
        if nucleus and mass >= top_p * total:
            break
        nucleus.append(token)
        mass += law[token]
    return nucleus


def raw_law(batch: RowBatch, row: int) -> Tensor:
    """Log-probs of the fused scores, float64 [width]."""
    return log_softmax(fused_scores(batch, row))


def reference_law(batch: RowBatch, row: int) -> Tensor:
    """Log-probs of the row that KL and flips compare with, float64 [width]."""
    spec = row_of(batch, row)
    return log_softmax(lane(batch, spec.reference or spec.base, spec.width))


def processed_scores(batch: RowBatch, controls: PickControls, row: int) -> Tensor:
    """Fused scores after adjustments, divided by the temperature unless it is 0; float64 [width]."""
    scores = adjusted(fused_scores(batch, row), controls.adjustments, row)
    temperature = float(controls.temperature[row])
    return scores / temperature if temperature > 0 else scores


def processed_law(batch: RowBatch, controls: PickControls, row: int) -> Tensor:
    """Log-probs that the token is drawn from, float64 [width], -inf where the filters removed it; at temperature 0
    all on the best token."""
    scores = processed_scores(batch, controls, row)
    if float(controls.temperature[row]) == 0:
        kept = ordered_ids(scores)[:1]
    else:
        kept = kept_ids(
            scores, int(controls.top_k[row]), float(controls.top_p[row]), float(controls.min_p[row])
        )
    filtered = torch.full_like(scores, -math.inf)
    filtered[kept] = scores[kept]
    return log_softmax(filtered)


def race(
    scores: Tensor, seed: int, position: int, streams: tuple[int, int] = TOKEN_STREAMS
) -> tuple[int, float]:
    """The hierarchical Gumbel draw from `scores` [V] (after filters): (token, margin).

    First the block with the largest log-mass + noise(block id), then in it the token with the largest score +
    noise(token id); lowest id on ties. The margin, in nats, is by how little the closer of the two was won: a float32
    draw may differ where it is about the rounding of the scores.
    """
    seeds, positions = torch.tensor([seed]), torch.tensor([position])
    blocks = -(-len(scores) // BLOCK)
    noise = gumbel(seeds, positions, streams[0], torch.tensor([0]), blocks)[0].double()
    masses = [torch.logsumexp(scores[b * BLOCK : (b + 1) * BLOCK].double(), dim=0) for b in range(blocks)]
    block, margin = _best(torch.stack(masses) + noise)
    inside = scores[block * BLOCK : (block + 1) * BLOCK].double()
    noise = gumbel(seeds, positions, streams[1], torch.tensor([block * BLOCK]), BLOCK)[0].double()
    place, second_margin = _best(inside + noise[: len(inside)])
    return block * BLOCK + place, min(margin, second_margin)


def draw_one(scores: Tensor, seed: int, position: int, streams: tuple[int, int] = TOKEN_STREAMS) -> int:
    """The token of `race`."""
    return race(scores, seed, position, streams)[0]


def _best(values: Tensor) -> tuple[int, float]:
    """(first place of the largest value, its lead over the next)."""
    entries = values.tolist()
    best = max(range(len(entries)), key=lambda place: entries[place])
    others = [entry for place, entry in enumerate(entries) if place != best and entry > -math.inf]
    return best, entries[best] - max(others, default=-math.inf)


def listed(law: Tensor, tokens: list[int]) -> list[float]:
    """Log-probs of `tokens` under `law` [V]; -inf for a token that is -1 or beyond the law."""
    return [float(law[token]) if 0 <= token < len(law) else -math.inf for token in tokens]


def rank(law: Tensor, token: int) -> int:
    """How many ids of `law` [V] come before `token`, best first, ties by id; -1 where the law rules it out."""
    values = law.tolist()
    own = values[token]
    if own == -math.inf:
        return -1
    return sum(value > own or (value == own and other < token) for other, value in enumerate(values))


def kl(p_log: Tensor, q_log: Tensor) -> float:
    """KL(p || q) = sum of p (log p - log q) over the tokens with p > 0, in nats, from log-probs [V]; +inf where q rules
    out what p does not."""
    p = p_log.exp()
    possible = p > 0
    return float((p[possible] * (p_log[possible] - q_log[possible])).sum())


# Tilts --------------------------------------------------------------------------------------------------------------


def _terms(batch: RowBatch, row: int) -> list[tuple[int, Term]]:
    """The row's terms with their columns in the batch's [B, T] tensors."""
    columns = (batch.positive[row, :, 0] != ABSENT).nonzero()[:, 0].tolist()
    return list(zip(columns, row_of(batch, row).terms, strict=True))


def _term_deltas(batch: RowBatch, row: int) -> Tensor:
    """Deltas of all T terms without weights, float64 [T, width]; 0 for unused terms."""
    spec = row_of(batch, row)
    deltas = torch.zeros(batch.terms, spec.width, dtype=torch.float64)
    for column, term in _terms(batch, row):
        deltas[column] = delta(batch, spec, term)
    return deltas


def _direction(batch: RowBatch, row: int) -> Tensor:
    """d = sum of weight_i * (positive_i - negative_i), float64 [width]."""
    direction = torch.zeros(int(batch.widths[row]), dtype=torch.float64)
    for own, weight in zip(_term_deltas(batch, row), batch.weights[row].tolist(), strict=True):
        if weight != 0:
            direction = direction + weight * own
    return direction


def _base_law(batch: RowBatch, row: int) -> Tensor:
    spec = row_of(batch, row)
    return log_softmax(lane(batch, spec.base, spec.width))


def tilted_law(base: Tensor, direction: Tensor, a: float) -> Tensor:
    """Log-probs of P(x) exp(a d(x)) / Z(a), float64 [V], from log-probs `base` and `direction` [V]."""
    return log_softmax(base + a * direction)


def _tilt_at(base: Tensor, direction: Tensor, a: float) -> TiltPoint:
    law = tilted_law(base, direction, a).exp()
    log_partition = float(torch.logsumexp(base + a * direction, dim=0))
    mean = float((law * direction).sum())
    centred = direction - mean
    return TiltPoint(log_partition, mean, float((law * centred**2).sum()), float((law * centred**3).sum()))


def tilt(batch: RowBatch, row: int, a: float) -> TiltPoint:
    """A(a), A', A'', A''' of the row's d under its base law."""
    return _tilt_at(_base_law(batch, row), _direction(batch, row), a)


def pair_divergences(batch: RowBatch, row: int) -> Divergences:
    """KL divergences between the two rows of every term, each normalised over the row's width. Where one of the two is
    -inf their difference counts as `clip`, not as infinite."""
    spec = row_of(batch, row)
    forward = torch.zeros(batch.terms, dtype=torch.float64)
    reverse = torch.zeros(batch.terms, dtype=torch.float64)
    for index, term in _terms(batch, row):
        if term.negative is not None:
            positive = log_softmax(lane(batch, term.positive, spec.width))
            negative = log_softmax(lane(batch, term.negative, spec.width))
            difference = delta(batch, spec._replace(normalise=True, one_sided=False), term)
            forward[index] = (positive.exp() * difference).sum()
            reverse[index] = -(negative.exp() * difference).sum()
    return Divergences(forward, reverse)


def moments(batch: RowBatch, row: int) -> RowMoments:
    """Log-partition at the row's weights, mean and covariance of the terms' deltas under P_w."""
    base, deltas = _base_law(batch, row), _term_deltas(batch, row)
    direction = _direction(batch, row)
    law = tilted_law(base, direction, 1.0).exp()
    gradient = (law * deltas).sum(dim=1)
    centred = deltas - gradient[:, None]
    covariance = (centred * law) @ centred.T
    return RowMoments(float(torch.logsumexp(base + direction, dim=0)), gradient, covariance)


def entropy(log_law: Tensor) -> float:
    """-sum of p log p in nats, of log-probs [V]."""
    possible = log_law > -math.inf
    return -float((log_law[possible].exp() * log_law[possible]).sum())


def temperature(batch: RowBatch, row: int, target: float, low: float, high: float) -> float:
    """The temperature between `low` and `high` at which the row's fused law has entropy `target`, by bisection."""
    scores = fused_scores(batch, row)
    for _ in range(200):
        middle = math.sqrt(low * high)
        if entropy(log_softmax(scores / middle)) < target:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


class _Line(NamedTuple):
    """Divergences along P_a."""

    base: Tensor
    direction: Tensor

    def forward(self, a: float) -> float:
        point = _tilt_at(self.base, self.direction, a)
        return a * point.mean - point.log_partition

    def reverse(self, a: float) -> float:
        at_zero = _tilt_at(self.base, self.direction, 0.0)
        return _tilt_at(self.base, self.direction, a).log_partition - a * at_zero.mean

    def objective(self, a: float, forward: float, reverse: float) -> float:
        """The published one: squared distances of both divergences from their targets."""
        return (self.forward(a) - forward) ** 2 + (self.reverse(a) - reverse) ** 2


def solve(batch: RowBatch, controls: SolveControls, row: int) -> RowSolution:
    """The row's multiplier, by bisection to 1e-12 (BOTH: by a scan and golden sections)."""
    match = Match(int(controls.match[row]))
    largest, budget = float(controls.max_weight[row]), float(controls.budget[row])
    weights = batch.weights[row].cpu().double()
    if match == Match.NONE:
        return RowSolution(weights, 1.0, 0.0, 0.0, True)
    if match == Match.PAPER:
        return _paper(batch, row)
    line = _Line(_base_law(batch, row), _direction(batch, row))
    pairs = pair_divergences(batch, row)
    shares = weights.abs() / weights.abs().sum()
    forward, reverse = float((shares * pairs.forward).sum()), float((shares * pairs.reverse).sum())
    if match == Match.FORWARD:
        a, converged = _bisect(line.forward, forward, largest)
    elif match == Match.REVERSE:
        a, converged = _bisect(line.reverse, reverse, largest)
    elif match == Match.BUDGET:
        a, converged = _bisect(line.forward, budget, largest)
    else:
        ends = (
            _bisect(line.forward, forward, largest)[0],
            _bisect(line.reverse, reverse, largest)[0],
        )
        a = _least(lambda a: line.objective(a, forward, reverse), min(ends), max(ends))
        # At the edge the least is not inside: both divergences together would still rather grow.
        converged = a < largest - 1e-9
    return RowSolution(a * weights, a, line.forward(a), line.reverse(a), converged)


def _bisect(function: Callable[[float], float], target: float, largest: float) -> tuple[float, bool]:
    """The a in [0, largest] where a growing `function` reaches `target`, and whether it does."""
    if function(largest) < target:
        return largest, False
    low, high = 0.0, largest
    while high - low > 1e-12 * max(1.0, high):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if function(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2, True


def _least(objective: Callable[[float], float], low: float, high: float) -> float:
    """Where `objective` is least in [low, high]."""
    grid = torch.linspace(low, high, _SCAN, dtype=torch.float64).tolist()
    best = min(range(_SCAN), key=lambda place: objective(grid[place]))
    low, high = grid[max(0, best - 1)], grid[min(_SCAN - 1, best + 1)]
    section = (math.sqrt(5) - 1) / 2
    while high - low > 1e-12 * max(1.0, high):
        left, right = high - section * (high - low), low + section * (high - low)
        if left <= low or right >= high:
            break
        if objective(left) <= objective(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def _paper(batch: RowBatch, row: int) -> RowSolution:
    """The published grid: 0.0, 0.1 .. 2.0 for one term at a time, the objective summed over all terms' targets; first
    term and lowest a on ties."""
    base, deltas, pairs = _base_law(batch, row), _term_deltas(batch, row), pair_divergences(batch, row)
    best, best_term, best_a = math.inf, 0, 0.0
    for term, _ in _terms(batch, row):
        line = _Line(base, deltas[term])
        for step in range(21):
            a = step / 10
            objective = sum(
                line.objective(a, float(pairs.forward[other]), float(pairs.reverse[other]))
                for other, _ in _terms(batch, row)
            )
            if objective < best:
                best, best_term, best_a = objective, term, step / 10
    weights = torch.zeros(batch.terms, dtype=torch.float64)
    weights[best_term] = best_a
    line = _Line(base, deltas[best_term])
    return RowSolution(weights, best_a, line.forward(best_a), line.reverse(best_a), True)


# Speculation --------------------------------------------------------------------------------------------------------


def acceptance(p_log: Tensor, q_log: Tensor, token: int) -> float:
    """min(1, p(token) / q(token)) from log-probs [V] of target and draft."""
    return math.exp(min(0.0, float(p_log[token] - q_log[token])))


def residual_law(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Log-probs [V] of max(p - q, 0), renormalised; -inf throughout if p = q."""
    rest = (p_log.exp() - q_log.exp()).clamp(min=0.0)
    total = rest.sum()
    return (rest / total).log() if total > 0 else torch.full_like(rest, -math.inf)


def emitted_law(p_log: Tensor, q_log: Tensor) -> Tensor:
    """Probabilities [V] of the first emitted token under rejection: q(x) min(1, p(x) / q(x)) plus the chance of a
    rejection times the residual. Equals p."""
    stands = torch.minimum(p_log.exp(), q_log.exp())
    return stands + (1 - stands.sum()) * residual_law(p_log, q_log).exp()


def verify(
    batch: RowBatch, controls: PickControls, drafts: Drafts, request: int, rule: VerifyRule = "rejection"
) -> Verdict:
    """One request, token by token. The coin of a place is uniform number 0 of STREAM_ACCEPT under its row's seed and
    position; a draft stands if the coin is below its acceptance. A replacement is drawn with RESIDUAL_STREAMS; without
    a residual (p = q up to rounding) it is the row's own draw."""
    emitted: list[int] = []
    rows = drafts.rows[request].tolist()
    for place, draft in enumerate([*drafts.tokens[request].tolist(), -1]):
        row = rows[place]
        p_log = processed_law(batch, controls, row)
        seed, position = int(controls.seeds[row]), int(controls.positions[row])
        own = draw_one(p_log, seed, position)
        if draft < 0:
            return Verdict(place, [*emitted, own])
        if rule == "shared_noise":
            if own != draft:
                return Verdict(place, [*emitted, own])
        else:
            assert drafts.laws is not None and drafts.law_controls is not None and drafts.law_rows is not None
            q_log = processed_law(drafts.laws, drafts.law_controls, int(drafts.law_rows[request, place]))
            q_log = _to_width(q_log, len(p_log))
            coin = uniform(
                torch.tensor([seed]), torch.tensor([position]), STREAM_ACCEPT, torch.tensor([0]), 1
            )
            if float(coin) >= acceptance(p_log, q_log, draft):
                residual = residual_law(p_log, q_log)
                if bool((residual > -math.inf).any()):
                    own = draw_one(residual, seed, position, RESIDUAL_STREAMS)
                return Verdict(place, [*emitted, own])
        emitted.append(draft)
    raise AssertionError("every request ends with a place without a draft")


def _to_width(law: Tensor, width: int) -> Tensor:
    """`law` [V] cut or filled up with -inf to [width]."""
    filled = torch.full((width,), -math.inf, dtype=law.dtype)
    common = min(width, len(law))
    filled[:common] = law[:common]
    return filled
