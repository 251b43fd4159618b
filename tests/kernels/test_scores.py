"""Fused scores of both backends against the slow twin, for everything a row may say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor

from proxyserve_kernels import FUSED, Backend, Ref, Row, RowBatch, Support, Term
from proxyserve_kernels import reference as slow
from tests.kernels.strategies import (
    DTYPES,
    GARBAGE,
    batches,
    examples,
    interpreted,
    logits,
    rounding,
    source,
    spread,
    support_is_clear,
    widths_for,
)

INF = math.inf


def assert_same_scores(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """`got` float32 [columns] against `expected` float64 [width]: the same tokens at -inf, the others within
    `tolerance` nats, nothing beyond the width."""
    got = got.cpu().double()
    width = len(expected)
    assert torch.isneginf(got[width:]).all()
    torch.testing.assert_close(got[:width], expected, atol=tolerance, rtol=0, equal_nan=True)


def assert_fuses(backend: Backend, batch: RowBatch) -> None:
    scores = backend.fused_scores(batch)
    assert scores.dtype == torch.float32 and tuple(scores.shape) == (batch.size, batch.width)
    assert scores.device == batch.device
    for row in range(batch.size):
        tolerance = rounding(batch, row)
        # Whether a token on the very edge of a support is inside, float32 cannot always tell.
        if support_is_clear(batch, row, tolerance):
            assert_same_scores(scores[row], slow.fused_scores(batch, row), tolerance)


def test_sums(backend: Backend) -> None:
    @examples(backend, 120, 8)
    @given(batch=batches(widths_for(backend), rules=False))
    def check(batch: RowBatch) -> None:
        assert_fuses(backend, batch)

    check()


def test_rules(backend: Backend) -> None:
    @examples(backend, 250, 10)
    @given(batch=batches(widths_for(backend), rules=True))
    def check(batch: RowBatch) -> None:
        assert_fuses(backend, batch)

    check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 255, 256, 257, 4099])
def test_every_width_and_dtype(backend: Backend, width: int, dtype: torch.dtype) -> None:
    """Rows of four lengths, in sources of three widths, with garbage around them."""
    generator = torch.Generator().manual_seed(width)
    widths = [max(1, width - row) for row in range(4 if not interpreted(backend) else 2)]
    sources = [
        spread([logits(generator, own, "smooth") for own in widths], dtype, padding, 3, garbage)
        for padding, garbage in ((5, GARBAGE[0]), (3, GARBAGE[1]), (300, GARBAGE[3]))
    ]
    term = Term(Ref(1, 0), Ref(2, 0), 0.75)
    rows = [
        Row(Ref(0, r), own, () if r == 1 else (term._replace(positive=Ref(1, r), negative=Ref(2, r)),))
        for r, own in enumerate(widths)
    ]
    assert_fuses(backend, RowBatch.of(sources, rows))


def fused(backend: Backend, rows: list[list[float]], **fields: object) -> list[float]:
    """Scores of one fused row whose base is row 0 of the source."""
    batch = RowBatch.of([source(*rows)], [Row(Ref(0, 0), len(rows[0]))._replace(**fields)])
    scores = backend.fused_scores(batch)[0]
    assert torch.isneginf(scores[len(rows[0]) :]).all()
    return scores[: len(rows[0])].tolist()


def pair(weight: float) -> tuple[Term, ...]:
    return (Term(Ref(0, 1), Ref(0, 2), weight),)


@pytest.mark.parametrize("weight", [1.0, -1.0, 0.0])
def test_infinities_in_a_pair_follow_the_policy(backend: Backend, weight: float) -> None:
    """Both out: the base alone; positive out: down by the clip; negative out: up; base out: stays out."""
    rows = [[0.0, 0.0, 0.0, -INF, -INF], [-INF, -INF, 0.0, 9.0, -INF], [-INF, 0.0, -INF, 0.0, 1.0]]
    assert fused(backend, rows, terms=pair(weight)) == [0.0, -50 * weight, 50 * weight, -INF, -INF]
    assert fused(backend, rows, terms=pair(weight), clip=4.0) == [0.0, -4 * weight, 4 * weight, -INF, -INF]


def test_a_term_without_a_negative(backend: Backend) -> None:
    rows = [[1.0, 2.0, -INF], [-INF, 0.5, 3.0]]
    assert fused(backend, rows, terms=(Term(Ref(0, 1), None, 2.0),)) == [-99.0, 3.0, -INF]


@pytest.mark.parametrize("base_weight", [0.0, -1.0, 2.0])
def test_a_weighted_base_keeps_its_impossible_tokens(backend: Backend, base_weight: float) -> None:
    rows = [[1.0, -INF, 3.0], [0.5, 0.5, 0.5]]
    expected = [base_weight + 0.5, -INF, 3 * base_weight + 0.5]
    assert fused(backend, rows, base_weight=base_weight, terms=(Term(Ref(0, 1)),)) == expected


def test_one_sided_terms_only_add(backend: Backend) -> None:
    rows = [[0.0, 0.0], [math.log(0.75) + 5, math.log(0.25) + 5], [7.0, 7.0]]
    expected = [2 * math.log(1.5), 0.0]
    assert fused(backend, rows, one_sided=True, terms=pair(2.0)) == pytest.approx(expected, abs=1e-5)


def test_normalised_terms_ignore_a_constant(backend: Backend) -> None:
    rows = [[0.0, 0.0], [math.log(0.75) + 5, math.log(0.25) + 5], [7.0, 7.0]]
    expected = [math.log(1.5), math.log(0.5)]
    assert fused(backend, rows, normalise=True, terms=pair(1.0)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("power", [-2.0, -1.0, -INF])
def test_negative_powers_let_every_lane_rule_out(backend: Backend, power: float) -> None:
    rows = [[0.0, 0.0, -INF], [0.0, -INF, 0.0], [-INF, 0.0, 0.0]]
    terms = (Term(Ref(0, 1), None, 0.5), Term(Ref(0, 2), None, 0.0))
    scores = fused(backend, rows, power=power, terms=terms)
    assert math.isfinite(scores[0]) and scores[1:] == [-INF, -INF]


@pytest.mark.parametrize("power", [1.0, 0.5, INF])
def test_positive_powers_let_one_lane_allow(backend: Backend, power: float) -> None:
    rows = [[0.0, 0.0, -INF, -INF], [0.0, -INF, 0.0, -INF], [0.0, 0.0, 0.0, 0.0]]
    terms = (Term(Ref(0, 1), None, 0.5), Term(Ref(0, 2), None, 0.0))
    scores = fused(backend, rows, power=power, terms=terms)
    assert all(math.isfinite(score) for score in scores[:3]) and scores[3] == -INF


def test_a_support_is_a_union(backend: Backend) -> None:
    rows = [[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [5.0, 6.0, 7.0, 8.0]]
    terms = (Term(Ref(0, 2)),)
    whole = fused(backend, rows, terms=terms)
    masked = fused(backend, rows, terms=terms, support=Support((Ref(0, 0), Ref(0, 1)), top_k=1))
    assert masked == [whole[0], -INF, -INF, whole[3]]
    base = Support((Ref(0, 0), Ref(0, 1)), top_k=1, outside="base")
    assert fused(backend, rows, terms=terms, support=base) == [whole[0], 2.0, 1.0, whole[3]]
    own = fused(backend, rows, terms=terms, support=Support((FUSED,), top_k=2))
    assert own == [whole[0], whole[1], -INF, -INF], "four equal scores: the lowest ids"


def test_a_nan_stays_in_its_row(backend: Backend) -> None:
    """Through every rule that could hide it: a clamp, a maximum, a mask."""
    good, bad = [0.0, 1.0, 2.0], [0.0, math.nan, 2.0]
    terms = pair(1.0)
    variants: list[dict[str, object]] = [
        {"terms": terms},
        {"terms": terms, "one_sided": True},
        {"terms": (Term(Ref(0, 1)),), "power": 1.0},
        {"terms": (Term(Ref(0, 1)),), "power": INF},
        {"terms": (Term(Ref(0, 1)),), "power": -INF},
        {"terms": terms, "support": Support((Ref(0, 0),), top_k=1)},
        {"terms": terms, "support": Support((FUSED,), top_k=1)},
    ]
    for place in range(3):
        for fields in variants:
            rows = [good, good, good, good]
            rows[place] = bad
            batch = RowBatch.of(
                [source(*rows)],
                [Row(Ref(0, 3), 3), Row(Ref(0, 0), 3)._replace(**fields), Row(Ref(0, 3), 3, terms[:0])],
            )
            if place == 2 and "power" in fields:
                continue  # not read
            scores = backend.fused_scores(batch)[:, :3].cpu()
            assert scores[0].tolist() == scores[2].tolist() == good
            assert scores[1].isnan().any(), (place, fields)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row(Ref(2, 0), 4), "base names a source that is not there"),
        (Row(Ref(1, 3), 4), "base names a row that source 1 with 3 rows does not have"),
        (Row(Ref(0, -1), 4), "base names a row that source 0 with 2 rows does not have"),
        (Row(Ref(0, 0), 5, (Term(Ref(1, 0)),)), "wider than source 1, which positive names"),
        (Row(Ref(0, 0), 0), "wider than source 0, which base names, or has no width"),
    ],
)
def test_rows_that_are_not_there_are_told(row: Row, message: str) -> None:
    sources = [torch.zeros(2, 6), torch.zeros(3, 4)]
    RowBatch.of(sources, [Row(Ref(1, 2), 4)])
    with pytest.raises(ValueError, match=message):
        RowBatch.of(sources, [Row(Ref(1, 2), 4), row])
