"""The slow twin against numbers worked out by hand: the tests of the backends are worth no more than it is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from proxyserve_kernels import (
    FUSED,
    Adjustments,
    Drafts,
    Match,
    PickControls,
    Ref,
    Row,
    RowBatch,
    SolveControls,
    Support,
    Term,
)
from proxyserve_kernels import reference as slow
from tests.kernels.strategies import floats, ints, source

INF = math.inf


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) if p else -INF for p in probabilities]


def batch_of(rows: list[list[float]], **fields: object) -> RowBatch:
    """One fused row; row 0 of the source is its base."""
    return RowBatch.of([source(*rows)], [Row(Ref(0, 0), len(rows[0]))._replace(**fields)])


def pair(weight: float = 1.0) -> tuple[Term, ...]:
    return (Term(Ref(0, 1), Ref(0, 2), weight),)


def probabilities(law: Tensor) -> list[float]:
    return law.exp().tolist()


def test_a_row_survives_the_arrays() -> None:
    rows = [
        Row(Ref(0, 0), 3),
        Row(Ref(0, 1), 2, pair(0.5), base_weight=0.25, one_sided=True, clip=7.0),
        Row(Ref(0, 1), 3, (Term(Ref(0, 2)),), power=-INF, reference=Ref(0, 2)),
        Row(Ref(0, 0), 3, support=Support((FUSED, Ref(0, 1)), 5, 0.5, 0.25, "base"), normalise=True),
    ]
    batch = RowBatch.of([torch.zeros(3, 4)], rows)
    for number, row in enumerate(rows):
        assert slow.row_of(batch, number) == row._replace(reference=row.reference or row.base)


def test_the_sum() -> None:
    batch = batch_of([[1.0, 2.0], [0.5, 3.0], [1.5, 1.0]], terms=pair(2.0))
    assert slow.fused_scores(batch, 0).tolist() == [1 + 2 * (0.5 - 1.5), 2 + 2 * (3 - 1)]
    batch = batch_of([[1.0, 2.0], [0.5, 3.0]], terms=(Term(Ref(0, 1), None, -1.0),), base_weight=3.0)
    assert slow.fused_scores(batch, 0).tolist() == [3 - 0.5, 6 - 3.0]


def test_infinities() -> None:
    """Both out, positive out, negative out, base out; then a positive row alone."""
    rows = [[0.0, 0.0, 0.0, -INF], [-INF, -INF, 0.0, 9.0], [-INF, 0.0, -INF, 0.0]]
    assert slow.fused_scores(batch_of(rows, terms=pair()), 0).tolist() == [0.0, -50.0, 50.0, -INF]
    assert slow.fused_scores(batch_of(rows, terms=pair(-1.0), clip=4.0), 0).tolist() == [0.0, 4.0, -4.0, -INF]
    alone = batch_of(rows, terms=(Term(Ref(0, 1)),))
    assert slow.fused_scores(alone, 0).tolist() == [-50.0, -50.0, 0.0, -INF]
    assert slow.fused_scores(batch_of(rows, base_weight=0.0), 0).tolist() == [0.0, 0.0, 0.0, -INF]


def test_normalised_and_one_sided_terms() -> None:
    rows = [[0.0, 0.0], [v + 5 for v in logs(0.75, 0.25)], [v - 3 for v in logs(0.5, 0.5)]]
    normalised = slow.fused_scores(batch_of(rows, terms=pair(), normalise=True), 0)
    assert normalised.tolist() == pytest.approx([math.log(1.5), math.log(0.5)])
    one_sided = slow.fused_scores(batch_of(rows, terms=pair(2.0), one_sided=True), 0)
    assert one_sided.tolist() == pytest.approx([2 * math.log(1.5), 0.0])


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        (0.0, [0.5 * math.log(0.8) + math.log(0.4), 0.5 * math.log(0.2) + math.log(0.6)]),
        (1.0, [math.log(0.5 * 0.8 + 0.4), math.log(0.5 * 0.2 + 0.6)]),
        (-1.0, [-math.log(0.5 / 0.8 + 1 / 0.4), -math.log(0.5 / 0.2 + 1 / 0.6)]),
        (2.0, [0.5 * math.log(0.5 * 0.64 + 0.16), 0.5 * math.log(0.5 * 0.04 + 0.36)]),
        (INF, logs(0.8, 0.6)),
        (-INF, logs(0.4, 0.2)),
    ],
)
def test_power_means(power: float, expected: list[float]) -> None:
    rows = [[v + 2 for v in logs(0.8, 0.2)], [v - 1 for v in logs(0.4, 0.6)], logs(0.01, 0.99)]
    terms = (Term(Ref(0, 1)), Term(Ref(0, 2), None, 0.0))
    batch = batch_of(rows, terms=terms, base_weight=0.5, power=power)
    assert slow.fused_scores(batch, 0).tolist() == pytest.approx(expected, rel=1e-6)


def test_negative_powers_are_a_veto() -> None:
    rows = [logs(0.5, 0.5, 0.0), logs(0.5, 0.0, 0.5), logs(0.0, 0.5, 0.5)]
    terms = (Term(Ref(0, 1)), Term(Ref(0, 2), None, 0.0))
    assert probabilities(slow.fused_scores(batch_of(rows, terms=terms, power=-2.0), 0))[1:] == [0.0, 0.0]
    either = probabilities(slow.fused_scores(batch_of(rows, terms=terms, power=1.0), 0))
    assert either == pytest.approx([1.0, 0.5, 0.5])


def test_supports() -> None:
    rows = [logs(0.6, 0.3, 0.1, 0.0), logs(0.0, 0.1, 0.2, 0.7), logs(0.25, 0.25, 0.25, 0.25)]
    terms = (Term(Ref(0, 1), None, 1.0),)

    def scores(**fields: object) -> list[float]:
        return slow.fused_scores(batch_of(rows, terms=terms, **fields), 0).tolist()

    whole = scores()
    assert scores(support=Support((Ref(0, 0),), top_p=0.7)) == [*whole[:2], -INF, -INF]
    union = Support((Ref(0, 0), Ref(0, 1)), top_k=1, outside="base")
    assert scores(support=union, base_weight=2.0) == pytest.approx(
        [2 * math.log(0.6) - 50, 2 * math.log(0.3), 2 * math.log(0.1), -INF]
    )
    assert scores(support=Support((FUSED,), top_k=1)) == [-INF, whole[1], -INF, -INF]


def test_filters_and_their_order() -> None:
    scores = torch.tensor(logs(0.1, 0.4, 0.0, 0.1, 0.3, 0.1), dtype=torch.float64)
    assert slow.ordered_ids(scores) == [1, 4, 0, 3, 5]
    assert slow.kept_ids(scores, 0, 1.0, 0.0) == [1, 4, 0, 3, 5]
    assert slow.kept_ids(scores, 4, 1.0, 0.0) == [1, 4, 0, 3]
    assert slow.kept_ids(scores, 0, 0.69, 0.0) == [1, 4]
    assert slow.kept_ids(scores, 0, 0.71, 0.0) == [1, 4, 0]
    assert slow.kept_ids(scores, 0, 1.0, 0.5) == [1, 4]
    assert slow.kept_ids(scores, 2, 0.6, 0.0) == [1, 4], "0.4 of the 0.7 that top-k leaves is not enough"
    assert slow.kept_ids(scores, 0, 0.0, 0.0) == [1]


def test_adjustments_come_in_order() -> None:
    adjustments = replace(
        Adjustments.none(),
        bias_rows=ints([0, 1]),
        bias_ids=ints([0, 1]),
        bias_values=floats([1.0, 9.0]),
        seen_rows=ints([0, 0]),
        seen_ids=ints([0, 1]),
        counts=floats([3, 0]),
        repetition=floats([2, 2]),
        presence=floats([0.5, 0.5]),
        frequency=floats([0.125, 0.125]),
        masks=torch.tensor([[-(2**31) + 0b111]], dtype=torch.int32),
        mask_of=ints([0, -1]),
    )
    scores = torch.zeros(40, dtype=torch.float64)
    scores[:3] = torch.tensor([2.0, -1.0, 0.5])
    first = slow.adjusted(scores, adjustments, 0)
    assert first[:3].tolist() == [1.5 - 0.375 - 0.5, -2.0, 0.5]
    assert first[3:31].max() == -INF and first[31] == 0.0 and first[32:].max() == -INF
    assert slow.adjusted(scores, adjustments, 1)[:3].tolist() == [2.0, 8.0, 0.5]


def test_what_a_mask_removes_and_named_tokens() -> None:
    lanes = source(logs(0.2, 0.5, 0.2, 0.1), logs(0.5, 0.25, 0.0, 0.25))
    batch = RowBatch.of([lanes], [Row(Ref(0, 0), 4), Row(Ref(0, 1), 4)])
    masked = replace(
        Adjustments.none(),
        masks=torch.tensor([[0b0110], [0]], dtype=torch.int32),
        mask_of=ints([-1, 1]),
        removed_by=ints([0, -1]),
    )
    assert slow.removed_mass(batch, masked, 0) == pytest.approx(0.3)
    assert slow.removed_mass(batch, masked, 1) == 0.0
    assert slow.removed_mass(batch, replace(masked, removed_by=ints([1, 1])), 1) == pytest.approx(1.0)
    law = slow.raw_law(batch, 0)
    assert slow.listed(law, [1, -1, 4]) == [pytest.approx(math.log(0.5)), -INF, -INF]


def test_laws_ranks_and_divergences() -> None:
    batch = batch_of([logs(0.2, 0.5, 0.2, 0.1)])
    controls = replace(PickControls.greedy(1), temperature=floats([1.0]), top_k=ints([2]))
    assert probabilities(slow.raw_law(batch, 0)) == pytest.approx([0.2, 0.5, 0.2, 0.1])
    law = slow.processed_law(batch, controls, 0)
    assert probabilities(law) == pytest.approx([2 / 7, 5 / 7, 0.0, 0.0])
    assert probabilities(slow.processed_law(batch, PickControls.greedy(1), 0)) == [0.0, 1.0, 0.0, 0.0]
    assert [slow.rank(law, token) for token in range(4)] == [1, 0, -1, -1]
    assert [slow.rank(slow.raw_law(batch, 0), token) for token in range(4)] == [1, 0, 2, 3]
    p, q = torch.tensor(logs(0.75, 0.25, 0.0)), torch.tensor(logs(0.5, 0.25, 0.25))
    assert slow.kl(p, q) == pytest.approx(0.75 * math.log(1.5))
    assert slow.kl(q, p) == INF


def test_draws() -> None:
    scores = torch.full((300,), -INF)
    scores[[7, 280]] = torch.tensor([0.0, -1.0])
    drawn = [slow.draw_one(scores, 5, position) for position in range(2000)]
    assert set(drawn) == {7, 280}
    expected = 2000 * math.exp(-1) / (1 + math.exp(-1))
    assert abs(drawn.count(280) - expected) < 4 * math.sqrt(expected)
    other = [slow.draw_one(scores, 5, position, slow.RESIDUAL_STREAMS) for position in range(100)]
    assert other != drawn[:100]


def test_tilts() -> None:
    """Two tokens: P = (p, 1 - p), d = (x, 0), so A(a) = log(1 + p (exp(a x) - 1))."""
    p, x, a = 0.25, 1.5, 0.75
    batch = batch_of([logs(p, 1 - p), [x / 2, 0.0], [0.0, 0.0]], terms=pair(2.0))
    point = slow.tilt(batch, 0, a)
    tilted = p * math.exp(a * x) / (1 + p * (math.exp(a * x) - 1))
    assert point.log_partition == pytest.approx(math.log(1 + p * (math.exp(a * x) - 1)), rel=1e-6)
    assert point.mean == pytest.approx(tilted * x, rel=1e-6)
    assert point.variance == pytest.approx(tilted * (1 - tilted) * x**2, rel=1e-6)
    assert point.third == pytest.approx(tilted * (1 - tilted) * (1 - 2 * tilted) * x**3, rel=1e-6)
    moments = slow.moments(batch, 0)
    once = slow.tilt(batch, 0, 1.0)
    assert moments.log_partition == pytest.approx(once.log_partition)
    assert moments.gradient.tolist() == pytest.approx([once.mean / 2])
    assert moments.covariance.tolist() == [pytest.approx([once.variance / 4])]


def test_pair_divergences() -> None:
    rows = [[0.0, 0.0], [v + 9 for v in logs(0.75, 0.25)], logs(0.5, 0.5), logs(1.0, 0.0)]
    terms = (Term(Ref(0, 1), Ref(0, 2)), Term(Ref(0, 1)), Term(Ref(0, 3), Ref(0, 2)))
    found = slow.pair_divergences(batch_of(rows, terms=terms), 0)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.forward.tolist() == pytest.approx([expected, 0.0, math.log(2)], rel=1e-6)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)
    assert found.reverse.tolist() == pytest.approx([backward, 0.0, 0.5 * math.log(0.5) + 0.5 * 50], rel=1e-6)


@pytest.mark.parametrize("match", [Match.FORWARD, Match.REVERSE, Match.BOTH, Match.PAPER, Match.NONE])
def test_the_untuned_model_as_base_needs_its_weight_unchanged(match: Match) -> None:
    rows = [logs(0.5, 0.3, 0.2), logs(0.1, 0.2, 0.7), logs(0.5, 0.3, 0.2)]
    controls = SolveControls(ints([match]), floats([5.0]), floats([0.0]))
    solution = slow.solve(batch_of(rows, terms=pair()), controls, 0)
    assert solution.converged and solution.multiplier == pytest.approx(1.0, abs=1e-6)
    assert solution.weights.tolist() == pytest.approx([1.0], abs=1e-6)


def test_budgets() -> None:
    rows = [logs(0.5, 0.3, 0.2), logs(0.1, 0.2, 0.7), logs(0.3, 0.3, 0.4)]
    batch = batch_of(rows, terms=pair(2.0))
    controls = SolveControls(ints([Match.BUDGET]), floats([50.0]), floats([0.25]))
    found = slow.solve(batch, controls, 0)
    tilted = slow.log_softmax(slow.fused_scores(batch.with_weights(found.weights[None].float()), 0))
    assert slow.kl(tilted, slow.reference_law(batch, 0)) == pytest.approx(0.25, rel=1e-5)
    assert found.converged
    small = slow.solve(batch, replace(controls, max_weight=floats([0.01])), 0)
    assert small.multiplier == pytest.approx(0.01) and not small.converged


def test_speculation() -> None:
    p = torch.tensor(logs(0.5, 0.3, 0.2, 0.0), dtype=torch.float64)
    q = torch.tensor(logs(0.2, 0.6, 0.0, 0.2), dtype=torch.float64)
    assert [slow.acceptance(p, q, token) for token in (0, 1, 3)] == pytest.approx([1.0, 0.5, 0.0])
    assert probabilities(slow.residual_law(p, q)) == pytest.approx([0.6, 0.0, 0.4, 0.0])
    assert slow.emitted_law(p, q).tolist() == pytest.approx([0.5, 0.3, 0.2, 0.0])
    assert slow.residual_law(p, p).max() == -INF
    assert slow.emitted_law(p, p).tolist() == pytest.approx(p.exp().tolist(), nan_ok=True)


def test_a_request_token_by_token() -> None:
    batch = RowBatch.of(
        [source([0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0])], [Row(Ref(0, r), 3) for r in range(3)]
    )
    controls = PickControls.greedy(3)
    for tokens, expected in (([1, 0], (2, [1, 0, 2])), ([1, 1], (1, [1, 0])), ([0, 0], (0, [1]))):
        drafts = Drafts(ints([tokens]), ints([[0, 1, 2]]))
        assert slow.verify(batch, controls, drafts, 0, "shared_noise") == expected
        laws = RowBatch.of([torch.zeros(2, 3)], [Row(Ref(0, r), 3) for r in range(2)])
        sampled = replace(PickControls.greedy(2), temperature=torch.ones(2))
        drafts = Drafts(ints([tokens]), ints([[0, 1, 2]]), laws, sampled, ints([[0, 1]]))
        assert slow.verify(batch, controls, drafts, 0) == expected
