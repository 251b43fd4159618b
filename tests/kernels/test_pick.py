"""`pick` of both backends against the slow twin: tokens, filters, laws, ranks, lists, divergences, bad rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from proxyserve_kernels import (
    FUSED,
    Adjustments,
    Backend,
    Logprobs,
    PickControls,
    Picks,
    Ref,
    Row,
    RowBatch,
    Support,
    Term,
)
from proxyserve_kernels import reference as slow
from tests.kernels.strategies import (
    Case,
    batches,
    examples,
    floats,
    interpreted,
    ints,
    picks,
    rounding,
    source,
    support_is_clear,
    widths_for,
)

INF = math.inf


def plain(*rows: Sequence[float]) -> RowBatch:
    """Every row is its base alone."""
    return RowBatch.of([source(*rows)], [Row(Ref(0, r), len(row)) for r, row in enumerate(rows)])


def controls(rows: int, **changes: Sequence[float]) -> PickControls:
    """Greedy for every row unless changed; row r has seed r and position 7."""
    values = {"seeds": range(rows), "positions": [7] * rows, **changes}
    integer = ("top_k", "seeds", "positions", "forced")
    tensors = {n: ints(list(v)) if n in integer else floats(list(v)) for n, v in values.items()}
    return replace(PickControls.greedy(rows), **tensors)


def listed(logprobs: Logprobs, row: int) -> dict[int, float]:
    """The possible tokens listed for a row, in order."""
    ids, values = logprobs.ids[row].tolist(), logprobs.values[row].tolist()
    known = [(token, value) for token, value in zip(ids, values, strict=True) if token >= 0]
    rest = [(token, value) for token, value in zip(ids, values, strict=True) if token < 0]
    assert all(value == -INF for _, value in rest), "padding"
    assert list(zip(ids, values, strict=True)) == known + rest, "padding comes last"
    return dict(known)


def assert_in_order(entries: dict[int, float], scores: Tensor | None = None) -> None:
    """Best first; where `scores` [V] tie exactly, ids ascend (log-probs may round to the same value without a tie)."""
    for (token, value), (later, later_value) in pairwise(entries.items()):
        assert value >= later_value
        if scores is not None and scores[token] == scores[later]:
            assert token < later


def assert_reports(
    logprobs: Logprobs, row: int, law: Tensor, token: int, count: int, tolerance: float
) -> None:
    """One row of `logprobs` against its `law` float64 [V]: the chosen token, its rank, and `count` listed ones."""
    own = float(law[token])
    if own == -INF:
        assert logprobs.chosen[row] == -INF and logprobs.ranks[row] == -1
    else:
        assert float(logprobs.chosen[row]) == pytest.approx(own, abs=tolerance)
        rank = int(logprobs.ranks[row])
        assert int((law > own + 2 * tolerance).sum()) <= rank <= int((law > own - 2 * tolerance).sum()) - 1
    entries = dict(list(listed(logprobs, row).items())[:count])
    assert len(entries) == min(count, int((law > -INF).sum()))
    assert_in_order(entries)
    best = law.sort(descending=True).values.tolist()
    for place, (other, value) in enumerate(entries.items()):
        assert value == pytest.approx(float(law[other]), abs=tolerance)
        assert value == pytest.approx(best[place], abs=tolerance)
    if token in entries:
        assert entries[token] == logprobs.chosen[row] and list(entries).index(token) == logprobs.ranks[row]


def assert_kept(
    kept: set[int], scores: Tensor, top_k: int, top_p: float, min_p: float, tolerance: float
) -> None:
    """`kept` is what the filters leave of `scores` float64 [V], but for tokens so near a threshold that scores off by
    `tolerance` nats may lie on its other side."""
    expected = slow.kept_ids(scores, top_k, top_p, min_p)
    if kept == set(expected):
        return
    law = torch.softmax(scores, dim=0)
    near = [float(scores[expected[-1]])]
    if min_p > 0:
        near.append(float(scores.max()) + math.log(min_p))
    alive = slow.kept_ids(scores, top_k, 1.0, min_p)
    total, reached = float(law[alive].sum()), 0.0
    slack = 1e-5 + 2 * tolerance
    for token in kept.symmetric_difference(expected):
        value = float(scores[token])
        at_score = any(abs(value - other) <= 2 * tolerance for other in near)
        reached = float(law[(scores > value) & torch.isin(torch.arange(len(scores)), ints(alive))].sum())
        level = reached + float(law[token]) * int((scores == value).sum())
        at_mass = top_p < 1 and reached - slack <= top_p * total <= level + slack
        assert at_score or at_mass, (token, value, near, reached, top_p * total)


def assert_picks(backend: Backend, case: Case) -> None:
    batch, asked = case
    got = backend.pick(batch, asked)
    assert got.tokens.dtype == torch.int64 and got.valid.dtype == got.flips.dtype == torch.bool
    assert got.processed is not None
    for row in range(batch.size):
        error = rounding(batch, row)
        if not support_is_clear(batch, row, error):
            continue
        raw, compared = slow.raw_law(batch, row), slow.reference_law(batch, row)
        divergence = slow.kl(raw, compared)
        if float(raw.max()) > -INF and divergence < INF:
            assert float(got.kl[row]) == pytest.approx(divergence, abs=1e-4 + 8 * error, rel=1e-4)
        if asked.adjustments is not None and asked.adjustments.removed_by is not None:
            assert got.removed is not None
            removed = slow.removed_mass(batch, asked.adjustments, row)
            assert float(got.removed[row]) == pytest.approx(removed, rel=1e-4 + 8 * error, abs=1e-30)
        if _lead(raw) > 2 * error and _lead(compared) > 1e-6:
            assert bool(got.flips[row]) == (int(raw.argmax()) != int(compared.argmax()))
        scores = slow.processed_scores(batch, asked, row)
        if not bool((scores > -INF).any()):
            assert not got.valid[row] and got.tokens[row] == -1
            continue
        assert got.valid[row]
        token, temperature = int(got.tokens[row]), float(asked.temperature[row])
        wish = asked.raw[row]
        if wish is not None:
            assert got.raw is not None
            assert_reports(got.raw, row, raw, token, wish, 2 * error)
            if asked.listed is not None:
                assert got.raw.listed is not None
                values, tokens = got.raw.listed[row].tolist(), asked.listed[row].tolist()
                assert values == pytest.approx(slow.listed(raw, tokens), abs=2 * error)
                alike = {**listed(got.raw, row), token: float(got.raw.chosen[row])}
                assert all(alike.get(t, v) == v for t, v in zip(tokens, values, strict=True)), (
                    "one float each"
                )
        kept = list(listed(got.processed, row))
        if temperature == 0:
            assert float(scores[token]) >= float(scores.max()) - 4 * error
            assert kept == [token] and got.processed.chosen[row] == 0
            continue
        scale = (error + 4e-7 * _span(scores) * temperature) / temperature
        filters = int(asked.top_k[row]), float(asked.top_p[row]), float(asked.min_p[row])
        assert_kept(set(kept), scores, *filters, tolerance=scale)
        # From here on with the tokens that were kept: the draw and the law of those.
        filtered = torch.full_like(scores, -INF)
        filtered[kept] = scores[kept]
        assert_reports(got.processed, row, slow.log_softmax(filtered), token, len(kept), 4 * scale)
        drawn, margin = slow.race(filtered, int(asked.seeds[row]), int(asked.positions[row]))
        assert token == drawn or margin < 8 * scale + 1e-5


def _lead(law: Tensor) -> float:
    """How far the best token is ahead of the next, nats."""
    best = law.topk(min(2, len(law))).values
    return float(best[0] - best[-1]) if len(law) > 1 else INF


def _span(scores: Tensor) -> float:
    return float(scores[scores > -INF].abs().max())


@st.composite
def cases(draw: st.DrawFn, widths: Sequence[int], rules: bool, huge: bool = False) -> Case:
    batch = draw(batches(widths, rules=rules, huge=huge))
    return Case(batch, draw(picks(batch)))


@pytest.mark.parametrize("rules", [False, True], ids=["sums", "rules"])
def test_mixed_batches(backend: Backend, rules: bool) -> None:
    @examples(backend, 120, 2)
    @given(case=cases(widths_for(backend), rules))
    def check(case: Case) -> None:
        assert_picks(backend, case)

    check()


# Filters ------------------------------------------------------------------------------------------------------------


@st.composite
def filtered_rows(draw: st.DrawFn) -> tuple[Tensor, PickControls]:
    """Scores float32 [4, V] and filters of each row."""
    width = draw(st.sampled_from((1, 2, 31, 256, 600)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    rows = []
    for _ in range(4):
        scores = torch.randn(width, generator=generator)
        match draw(st.sampled_from(("sharp", "flat", "equal", "ties", "holes", "two levels"))):
            case "sharp":
                scores = scores * 8
            case "flat":
                scores = scores * 0.01
            case "equal":
                scores = torch.zeros(width)
            case "ties":
                scores = scores.round()
            case "holes":
                scores[:: draw(st.integers(2, 6))] = -INF
                scores[-1] = 0.5
            case "two levels":
                scores = (scores > 0).float()
        rows.append(scores)
    each = range(4)
    asked = controls(
        4,
        temperature=[1.0] * 4,
        top_k=[draw(st.sampled_from((0, 0, 1, 3, 40, 257, 599, width, width + 1, 5000))) for _ in each],
        top_p=[draw(st.sampled_from((0.0, 1e-7, 0.3, 0.9, 0.999, 1.0, 1.0))) for _ in each],
        min_p=[draw(st.sampled_from((0.0, 0.0, 1e-6, 0.1, 1.0))) for _ in each],
        seeds=[draw(st.integers(-(2**63), 2**63 - 1)) for _ in each],
    )
    return torch.stack(rows), replace(asked, processed=(width,) * 4)


def test_filters(backend: Backend) -> None:
    """Rows without terms: ties are exact, so which of them stay is exact as well."""

    @examples(backend, 200, 3)
    @given(case=filtered_rows())
    def check(case: tuple[Tensor, PickControls]) -> None:
        rows, asked = case
        got = backend.pick(plain(*rows.tolist()), asked)
        assert got.processed is not None
        for row, scores in enumerate(rows.double()):
            kept = set(listed(got.processed, row))
            filters = int(asked.top_k[row]), float(asked.top_p[row]), float(asked.min_p[row])
            expected = set(slow.kept_ids(scores, *filters))
            law = torch.softmax(scores, dim=0)
            order = slow.kept_ids(scores, filters[0], 1.0, filters[2])
            total = sum(float(law[token]) for token in order)
            for token in kept.symmetric_difference(expected):
                # Only where float32 cannot tell on which side of a threshold the token lies.
                before = (
                    sum(float(law[other]) for other in order[: order.index(token)]) if token in order else 0.0
                )
                at_nucleus = token in order and abs(before - filters[1] * total) < 1e-5 * total
                at_floor = abs(float(law[token]) - filters[2] * float(law.max())) < 1e-5 * float(law.max())
                assert at_nucleus or at_floor, (row, token, filters)
            assert_in_order(listed(got.processed, row), scores)

    check()


@pytest.mark.parametrize("shape", ["flat", "equal", "ties"])
def test_filters_that_keep_very_many(backend: Backend, shape: str) -> None:
    """More tokens stay than any list of candidates holds; the last block is not full."""
    width = 1000 if interpreted(backend) else 20_011
    scores = torch.randn(width, generator=torch.Generator().manual_seed(1)) * 0.01
    if shape != "flat":
        scores = torch.zeros(width) if shape == "equal" else (scores * 100).round()
    wanted = [(0, 0.95, 0.0), (width - 9, 1.0, 0.0), (width // 2, 0.9, 0.01), (0, 1.0, 0.9)]
    asked = controls(
        4,
        temperature=[1.0] * 4,
        top_k=[k for k, _, _ in wanted],
        top_p=[p for _, p, _ in wanted],
        min_p=[m for _, _, m in wanted],
    )
    batch = RowBatch.of([source(scores.tolist())], [Row(Ref(0, 0), width)] * 4)
    got = backend.pick(batch, replace(asked, processed=(width,) * 4))
    assert got.processed is not None
    for row, (k, p, m) in enumerate(wanted):
        kept = list(listed(got.processed, row))
        expected = slow.kept_ids(scores.double(), k, float(torch.tensor(p)), float(torch.tensor(m)))
        # A sum of thousands of float32 masses may be off by a token or two at the end.
        assert abs(len(kept) - len(expected)) <= (3 if p < 1 else 0)
        assert kept[:-3] == expected[: len(kept) - 3]


# Single rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 255, 256, 700])
def test_draws_are_those_of_the_reference(backend: Backend, width: int) -> None:
    count = 8 if interpreted(backend) else 40
    generator = torch.Generator().manual_seed(width)
    scores = 2 * torch.randn(count, width, generator=generator)
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    positions = torch.randint(0, 2**32, (count,), generator=generator)
    asked = replace(
        PickControls.greedy(count), temperature=torch.ones(count), seeds=seeds, positions=positions
    )
    drawn = backend.pick(plain(*scores.tolist()), asked).tokens.tolist()
    assert drawn == [slow.draw_one(scores[r], int(seeds[r]), int(positions[r])) for r in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "bad", [[math.nan, 1.0], [1.0, math.nan], [INF, 1.0], [-INF, -INF], [INF, -INF], [math.nan, -INF]]
)
def test_bad_rows_fail_alone(backend: Backend, bad: list[float], temperature: float) -> None:
    batch = plain([0.0, 1.0], bad, [3.0, 1.0])
    asked = replace(controls(3, temperature=[0.0, temperature, 0.0]), raw=(1, 1, 1), processed=(1, 1, 1))
    got = backend.pick(batch, asked)
    assert got.valid.tolist() == [True, False, True]
    assert got.tokens.tolist() == [1, -1, 0]
    assert got.raw is not None and got.raw.ids[[0, 2], 0].tolist() == [1, 0]
    assert got.kl[[0, 2]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("place", ["positive", "negative"])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_bad_term_row_is_seen(backend: Backend, place: str, bad: float) -> None:
    """NaN through every rule that could hide it, between two good rows."""
    rows = [[0.0, 1.0, 2.0], [bad, 1.0, 2.0], [0.5, 0.0, 0.0]]
    positive, negative = (1, 2) if place == "positive" else (2, 1)
    term = Term(Ref(0, positive), Ref(0, negative))
    for fields in ({}, {"one_sided": True}, {"support": Support((FUSED,), top_k=1)}):
        if bad == INF and (fields or place == "negative"):
            continue  # a difference of -inf only removes the token, and a normalised +inf is NaN: covered above
        middle = Row(Ref(0, 0), 3, (term,))._replace(**fields)
        batch = RowBatch.of([source(*rows)], [Row(Ref(0, 0), 3), middle, Row(Ref(0, 2), 3)])
        got = backend.pick(batch, controls(3, temperature=[0.0, 1.0, 0.0]))
        assert got.valid.tolist() == [True, False, True], fields
        assert got.tokens.tolist() == [2, -1, 0]


def test_a_nan_is_seen_under_a_mask_and_under_filters(backend: Backend) -> None:
    masked = replace(
        Adjustments.none(), masks=torch.tensor([[0b110]], dtype=torch.int32), mask_of=ints([0, 0, 0])
    )
    batch = plain([0.0, 1.0, 2.0], [math.nan, 1.0, 2.0], [2.0, 1.0, 0.0])
    asked = controls(3, temperature=[1.0] * 3, top_k=[1] * 3)
    got = backend.pick(batch, replace(asked, adjustments=masked))
    assert got.valid.tolist() == [True, False, True] and got.tokens.tolist() == [2, -1, 1]


def test_a_grammar_that_allows_nothing(backend: Backend) -> None:
    masked = replace(Adjustments.none(), masks=torch.tensor([[0]], dtype=torch.int32), mask_of=ints([-1, 0]))
    got = backend.pick(plain([0.0, 1.0], [0.0, 1.0]), replace(controls(2), adjustments=masked, raw=(None, 2)))
    assert got.valid.tolist() == [True, False] and got.tokens.tolist() == [1, -1]
    assert got.raw is not None and got.raw.ids[1].tolist() == [1, 0], "the raw law does not know the grammar"


def test_a_single_finite_token_is_always_drawn(backend: Backend) -> None:
    rows = [[-INF] * 4 + [-30.0] + [-INF] * 3] * (5 if interpreted(backend) else 50)
    got = backend.pick(plain(*rows), controls(len(rows), temperature=[1.0] * len(rows)))
    assert set(got.tokens.tolist()) == {4} and got.valid.all()


def test_ties_go_to_the_lowest_id(backend: Backend) -> None:
    asked = replace(controls(1), raw=(3,), processed=(3,))
    got = backend.pick(plain([1.0, 2.0, 2.0, 0.0, 2.0]), asked)
    assert got.tokens.tolist() == [1] and got.raw is not None and got.processed is not None
    assert got.raw.ids.tolist() == [[1, 2, 4]] and got.raw.ranks.tolist() == [0]
    assert got.processed.ids.tolist() == [[1, -1, -1]], "greedy: all on one token"
    assert got.processed.values[0].tolist() == [0.0, -INF, -INF] and got.processed.chosen[0] == 0


@pytest.mark.parametrize("width", [600, 3000])
def test_ties_across_blocks(backend: Backend, width: int) -> None:
    row = [0.0] * width
    for token in (width - 1, 300, 599):
        row[token] = 1.0
    asked = replace(controls(1, temperature=[1.0], top_k=[5]), raw=(5,), processed=(8,))
    got = backend.pick(plain(row), asked)
    expected = [*sorted({300, 599, width - 1}), *range(5)][:5]
    assert got.raw is not None and got.raw.ids[0, :5].tolist() == expected
    assert got.processed is not None and list(listed(got.processed, 0)) == expected


def test_nothing_is_reported_unasked(backend: Backend) -> None:
    got = backend.pick(plain([1.0, 2.0], [1.0, 2.0]), controls(2))
    assert got.raw is None and got.processed is None
    got = backend.pick(plain([1.0, 2.0], [1.0, 2.0]), replace(controls(2), raw=(None, 0)))
    assert got.processed is None and got.raw is not None and got.raw.ids.shape == (2, 0)
    assert float(got.raw.chosen[1]) == pytest.approx(-math.log1p(math.exp(-1)))


def test_lists_are_as_long_as_the_longest_wish(backend: Backend) -> None:
    got = backend.pick(plain([1.0, 2.0, -INF, 0.0], [1.0, 2.0, 5.0, 0.0]), replace(controls(2), raw=(7, 1)))
    assert got.raw is not None and got.raw.ids.shape == got.raw.values.shape == (2, 7)
    assert got.raw.ids[0].tolist() == [1, 0, 3, -1, -1, -1, -1]
    assert got.raw.values[0, 3:].tolist() == [-INF] * 4
    assert got.raw.ids[1, 0] == 2


def test_forced_tokens_are_reported_instead(backend: Backend) -> None:
    rows = [[0.0, 1.0, 2.0, -INF]] * 4
    asked = controls(4, temperature=[1.0] * 4, top_k=[2] * 4, forced=[-1, 0, 1, 3])
    asked = replace(asked, raw=(0,) * 4, processed=(0,) * 4)
    free = backend.pick(plain(*rows), replace(asked, forced=None))
    got = backend.pick(plain(*rows), asked)
    assert got.tokens.tolist() == free.tokens.tolist(), "what is drawn does not change"
    assert got.raw is not None and got.processed is not None and free.raw is not None
    law = torch.log_softmax(torch.tensor(rows[0]), dim=0).tolist()
    assert got.raw.chosen[0] == free.raw.chosen[0]
    assert got.raw.chosen[1:].tolist() == pytest.approx([law[0], law[1], -INF])
    assert got.raw.ranks[1:].tolist() == [2, 1, -1]
    kept = torch.log_softmax(torch.tensor([1.0, 2.0]), dim=0).tolist()
    assert got.processed.chosen[1:].tolist() == pytest.approx([-INF, kept[0], -INF])
    assert got.processed.ranks[1:].tolist() == [-1, 1, -1]


def test_bias_penalties_and_masks(backend: Backend) -> None:
    adjustments = replace(
        Adjustments.none(),
        bias_rows=ints([0, 2]),
        bias_ids=ints([3, 1]),
        bias_values=floats([1.25, -INF]),
        seen_rows=ints([0, 0]),
        seen_ids=ints([0, 1]),
        counts=floats([3, 0]),
        repetition=floats([2, 2]),
        presence=floats([0.5, 0.5]),
        frequency=floats([0.1, 0.1]),
        masks=torch.tensor([[0b1101]], dtype=torch.int32),
        mask_of=ints([-1, 0, -1]),
    )
    row = [2.0, -1.0, 0.5, 0.0]
    asked = replace(
        controls(3, temperature=[1.0] * 3), adjustments=adjustments, raw=(4,) * 3, processed=(4,) * 3
    )
    got = backend.pick(plain(row, row, row), asked)
    assert got.raw is not None and got.processed is not None
    # 2/2 - 0.1*3 - 0.5; seen in the prompt only: multiplied, not penalised further; untouched; biased.
    for number, expected in enumerate(([0.2, -2.0, 0.5, 1.25], [2.0, -INF, 0.5, 0.0], [2.0, -INF, 0.5, 0.0])):
        law = torch.log_softmax(torch.tensor(expected), dim=0)
        entries = listed(got.processed, number)
        assert entries == pytest.approx({t: float(law[t]) for t in range(4) if law[t] > -INF}, abs=1e-5)
        plain_law = torch.log_softmax(torch.tensor(row), dim=0)
        assert listed(got.raw, number) == pytest.approx(dict(enumerate(plain_law.tolist())), abs=1e-5)


def test_the_mass_that_a_mask_removes(backend: Backend) -> None:
    """Of the raw law, whatever else changes the scores; tiny masses too, and of a mask that is not applied."""
    row = [2.0, -1.0, 0.5, -60.0]
    law = torch.softmax(torch.tensor(row, dtype=torch.float64), dim=0).tolist()
    adjustments = replace(
        Adjustments.none(),
        bias_rows=ints([0, 1]),
        bias_ids=ints([0, 3]),
        bias_values=floats([-9.0, 100.0]),
        masks=torch.tensor([[0b1001], [0b0111], [0], [-1]], dtype=torch.int32),
        mask_of=ints([0, 1, 2, 3, -1, -1]),
        removed_by=ints([0, 1, 2, 3, -1, 1]),
    )
    asked = controls(6, temperature=[0.3, 1.0, 1.0, 0.0, 1.0, 1.0], top_k=[1] * 6)
    got = backend.pick(plain(*[row] * 6), replace(asked, adjustments=adjustments))
    assert got.removed is not None
    expected = [law[1] + law[2], law[3], 1.0, 0.0, 0.0, law[3]]
    assert 1e-28 < law[3] < 1e-26, "no difference from 1 could show it"
    assert got.removed.tolist() == pytest.approx(expected, rel=1e-5)
    assert got.removed[2] == 1.0 and not got.valid[2]
    assert backend.pick(plain(row), controls(1)).removed is None


def test_masks_of_other_widths_than_the_row(backend: Backend) -> None:
    """Ids beyond the words are not allowed; words beyond the row mean nothing."""
    row = [0.0] * 40
    for words, kept in (([-1], 32), ([-1, -1, -1], 40), ([1] + [-1] * 19, 9)):
        masks = torch.tensor([words], dtype=torch.int32)
        masked = replace(Adjustments.none(), masks=masks, mask_of=ints([0]), removed_by=ints([0]))
        asked = replace(controls(1, temperature=[1.0]), adjustments=masked, processed=(40,))
        got = backend.pick(plain(row), asked)
        assert got.processed is not None and len(listed(got.processed, 0)) == kept
        assert got.removed is not None and float(got.removed[0]) == pytest.approx(1 - kept / 40, rel=1e-6)


def test_log_probs_of_named_tokens(backend: Backend) -> None:
    """One float wherever a token appears, in as many tokens as more than one program tells."""
    generator = torch.Generator().manual_seed(2)
    scores = 3 * torch.randn(2, 300, generator=generator)
    scores[:, 7] = -INF
    named = [[*range(-1, 40), 299, 300, 7, 7], [5] * 45]
    asked = replace(controls(2, forced=[39, 5]), raw=(300, 0), listed=ints(named))
    got = backend.pick(plain(*scores.tolist()), asked).raw
    assert got is not None and got.listed is not None and got.listed.shape == (2, 45)
    known = {-1: -INF, 300: -INF, 7: -INF, **listed(got, 0)}
    assert got.listed[0].tolist() == [known[token] for token in named[0]]
    assert got.listed[0, 40] == got.chosen[0] and set(got.listed[1].tolist()) == {float(got.chosen[1])}
    unnamed = backend.pick(plain(*scores.tolist()), replace(asked, listed=None)).raw
    assert unnamed is not None and unnamed.listed is None


def test_adjustments_leave_the_logits_alone(backend: Backend) -> None:
    """The sources belong to the caller."""
    batch = plain([1.0, 2.0], [3.0, 4.0])
    before = batch.sources[0].clone()
    bias = replace(Adjustments.none(), bias_rows=ints([0]), bias_ids=ints([0]), bias_values=floats([9.0]))
    backend.pick(batch, replace(controls(2, temperature=[0.5, 0.0], top_k=[1, 0]), adjustments=bias))
    assert torch.equal(batch.sources[0], before)


def test_divergence_and_flips(backend: Backend) -> None:
    """Of the raw law and the reference, which is the base unless named."""
    rows = [[0.0, 1.0], [3.0, 0.0], [0.0, 1.0]]
    term = (Term(Ref(0, 1), Ref(0, 2)),)
    batch = RowBatch.of(
        [source(*rows)],
        [
            Row(Ref(0, 0), 2),
            Row(Ref(0, 0), 2, term),
            Row(Ref(0, 0), 2, term, reference=Ref(0, 1)),
            Row(Ref(0, 0), 2, reference=Ref(0, 1)),
        ],
    )
    got = backend.pick(batch, controls(4, temperature=[0.0, 0.3, 1.0, 0.0]))
    assert got.kl[0] == 0
    expected = [slow.kl(slow.raw_law(batch, r), slow.reference_law(batch, r)) for r in range(4)]
    assert got.kl.tolist() == pytest.approx(expected, abs=1e-5)
    assert got.flips.tolist() == [False, True, False, True]


def test_picks_types(backend: Backend) -> None:
    got = backend.pick(plain([1.0, 2.0]), replace(controls(1), raw=(1,), processed=(1,)))
    assert isinstance(got, Picks) and got.raw is not None
    assert [got.tokens.dtype, got.valid.dtype, got.kl.dtype, got.flips.dtype] == [
        torch.int64,
        torch.bool,
        torch.float32,
        torch.bool,
    ]
    assert [got.raw.chosen.dtype, got.raw.ranks.dtype, got.raw.ids.dtype, got.raw.values.dtype] == [
        torch.float32,
        torch.int64,
        torch.int64,
        torch.float32,
    ]
