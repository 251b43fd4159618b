"""What must not change a row: its neighbours, its place, a constant in a model's logits, a difference of nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

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
    Match,
    PickControls,
    Picks,
    Ref,
    Row,
    RowBatch,
    SolveControls,
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
    logits,
    picks,
    rounding,
    spread,
    widths_for,
)


def take_rows(asked: PickControls, rows: list[int]) -> PickControls:
    """The controls of some rows; without adjustments, which name rows by number."""
    assert asked.adjustments is None
    values = {
        field.name: getattr(asked, field.name)[rows]
        for field in fields(asked)
        if isinstance(getattr(asked, field.name), Tensor)
    }
    lists = {"raw": [asked.raw[r] for r in rows]}
    if asked.processed is not None:
        lists["processed"] = [asked.processed[r] for r in rows]
    return replace(asked, **values, **lists)


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    assert left.dtype == right.dtype
    assert torch.equal(left.nan_to_num(nan=12345.0), right.nan_to_num(nan=12345.0)), (left, right)


def assert_same_picks(one: Picks, row: int, other: Picks, place: int, asked: PickControls) -> None:
    """Row `row` of `one` and row `place` of `other` agree bit for bit in all that `asked` defines for it."""
    for name in ("tokens", "valid", "kl", "flips"):
        assert_same_bits(getattr(one, name)[row], getattr(other, name)[place])
    for wishes, mine, others in (
        (asked.raw, one.raw, other.raw),
        (asked.processed, one.processed, other.processed),
    ):
        wish = None if wishes is None else wishes[row]
        if wish is not None:
            assert mine is not None and others is not None
            assert_same_logprobs(mine, row, others, place, wish)


def assert_same_logprobs(one: Logprobs, row: int, other: Logprobs, place: int, count: int) -> None:
    assert_same_bits(one.chosen[row], other.chosen[place])
    assert_same_bits(one.ranks[row], other.ranks[place])
    assert_same_bits(one.ids[row, :count], other.ids[place, :count])
    assert_same_bits(one.values[row, :count], other.values[place, :count])
    assert (one.listed is None) == (other.listed is None)
    if one.listed is not None and other.listed is not None:
        assert_same_bits(one.listed[row], other.listed[place])


@st.composite
def cases(draw: st.DrawFn, widths: Sequence[int], most_rows: int) -> Case:
    batch = draw(batches(widths, most_rows=most_rows, shapes=("smooth", "sharp", "ties", "holes", "shifted")))
    return Case(batch, draw(picks(batch, adjust=False)))


def assert_alone_as_together(backend: Backend, case: Case) -> None:
    batch, asked = case
    scores, together = backend.fused_scores(batch), backend.pick(batch, asked)
    for row in range(batch.size):
        alone = RowBatch.of(batch.sources, [slow.row_of(batch, row)])
        own = backend.fused_scores(alone)[0]
        assert_same_bits(own, scores[row, : len(own)])
        own_asked = take_rows(asked, [row])
        assert_same_picks(backend.pick(alone, own_asked), 0, together, row, own_asked)


def test_a_row_alone_is_the_row_in_the_batch(backend: Backend) -> None:
    """Whatever its neighbours have: more terms, other rules and filters, greater widths."""

    @examples(backend, 60, 2)
    @given(case=cases(widths_for(backend), 2 if interpreted(backend) else 4))
    def check(case: Case) -> None:
        assert_alone_as_together(backend, case)

    check()


def test_a_row_alone_is_the_row_in_the_batch_at_many_blocks(backend: Backend) -> None:
    width = 520 if interpreted(backend) else 4099
    generator = torch.Generator().manual_seed(3)
    sources = [
        spread([logits(generator, width, "smooth") for _ in range(8)], dtype, padding, 9, float("nan"))
        for dtype, padding in ((torch.float32, 5), (torch.bfloat16, 300))
    ]
    one, two = Term(Ref(0, 1), Ref(0, 2), 0.7), Term(Ref(1, 3), Ref(1, 4), -0.3)
    rows = [
        Row(Ref(0, 0), width),
        Row(Ref(1, 0), width - 1, (one,)),
        Row(Ref(0, 3), width, (one, two)),
        Row(Ref(0, 4), width, (Term(Ref(1, 1)),), power=0.5),
        Row(Ref(0, 5), width, (one,), support=Support((FUSED, Ref(0, 5)), top_p=0.9)),
        Row(Ref(0, 6), 300, (one, two), one_sided=True, support=Support((Ref(0, 6),), 50, 1.0, 0.0, "base")),
    ]
    B = len(rows)
    asked = replace(
        PickControls.greedy(B),
        temperature=floats([0.0, 1.0, 0.7, 1.0, 1.5, 1.0]),
        top_k=ints([0, 0, 20, 0, width - 99, 0]),
        top_p=floats([1.0, 0.9, 1.0, 0.99, 1.0, 1.0]),
        min_p=floats([0.0, 0.0, 0.01, 0.0, 0.0, 0.0]),
        seeds=torch.arange(B),
        raw=(5, None, 0, 3, 1, 2),
        processed=(1, 5, None, 0, 10, 20),
    )
    assert_alone_as_together(backend, Case(RowBatch.of(sources, rows), asked))


def test_a_wider_neighbour_changes_no_bit(backend: Backend) -> None:
    """A row of fewer tokens beside a wider one: more columns, so more blocks to add up, all of them empty for it."""
    width, wider = (700, 1027) if interpreted(backend) else (3000, 4099)
    for seed in range(1 if interpreted(backend) else 20):
        generator = torch.Generator().manual_seed(seed)
        held = spread(
            [3 * torch.randn(wider, generator=generator) for _ in range(3)], torch.float32, 0, 0, 0.0
        )
        row = Row(Ref(0, 1), width, (Term(Ref(0, 2)),))
        together = RowBatch.of([held], [Row(Ref(0, 0), wider), row])
        asked = replace(
            PickControls.greedy(2),
            temperature=torch.ones(2),
            top_p=floats([1.0, 0.9]),
            raw=(0, 3),
            processed=(0, 3),
        )
        one = take_rows(asked, [1])
        alone = backend.pick(RowBatch.of([held], [row]), one)
        assert_same_picks(alone, 0, backend.pick(together, asked), 1, one)


def test_a_removed_mass_alone_is_that_in_the_batch(backend: Backend) -> None:
    """Beside a wider neighbour, and whatever mask that has."""
    generator = torch.Generator().manual_seed(6)
    held = spread([3 * torch.randn(4099, generator=generator) for _ in range(3)], torch.float32, 0, 0, 0.0)
    row = Row(Ref(0, 1), 3000, (Term(Ref(0, 2)),))
    masks = torch.randint(-(2**31), 2**31, (2, 100), generator=generator).to(torch.int32)

    def removed(rows: list[Row], mask_of: list[int]) -> Tensor:
        own = replace(Adjustments.none(), masks=masks, mask_of=ints(mask_of), removed_by=ints(mask_of))
        asked = replace(PickControls.greedy(len(rows)), adjustments=own)
        found = backend.pick(RowBatch.of([held], rows), asked).removed
        assert found is not None
        return found

    alone = removed([row], [1])
    assert 0.2 < float(alone[0]) < 0.8
    for neighbour in (-1, 0):
        assert_same_bits(removed([Row(Ref(0, 0), 4099), row], [neighbour, 1])[1], alone[0])


def test_solutions_and_statistics_alone_are_those_in_the_batch(backend: Backend) -> None:
    width = 700
    generator = torch.Generator().manual_seed(4)
    held = spread([logits(generator, width, "smooth") for _ in range(7)], torch.float32, 3, 0, float("nan"))
    one, two = Term(Ref(0, 1), Ref(0, 2), 0.7), Term(Ref(0, 3), Ref(0, 4), -0.3)
    matches = [Match.FORWARD, Match.REVERSE, Match.BOTH, Match.BUDGET, Match.PAPER, Match.NONE]
    rows = [Row(Ref(0, r), width - r, (one, two)[: 1 + r % 2]) for r in range(6)]
    batch = RowBatch.of([held], rows)
    controls = SolveControls(ints(matches), floats([20.0] * 6), floats([0.3] * 6))
    multipliers = floats([[0.0, 0.5, 1.7]] * 6)
    together = (
        backend.solve(batch, controls),
        backend.tilt(batch, multipliers),
        backend.pair_divergences(batch),
        backend.moments(batch),
    )
    for row in range(6):
        alone = RowBatch.of([held], [rows[row]])
        own = SolveControls(controls.match[row : row + 1], controls.max_weight[:1], controls.budget[:1])
        found = (
            backend.solve(alone, own),
            backend.tilt(alone, multipliers[:1]),
            backend.pair_divergences(alone),
            backend.moments(alone),
        )
        for mine, others in zip(found, together, strict=True):
            for field in fields(mine):
                left, right = getattr(mine, field.name)[0], getattr(others, field.name)[row]
                # A batch with more terms has more columns; those of unused terms are 0.
                cut = tuple(slice(0, size) for size in left.shape)
                assert_same_bits(left, right[cut])


def test_permuting_the_batch_permutes_the_result(backend: Backend) -> None:
    @examples(backend, 40, 1)
    @given(case=cases(widths_for(backend), 5))
    def check(case: Case) -> None:
        batch, asked = case
        order = torch.randperm(batch.size, generator=torch.Generator().manual_seed(batch.size)).tolist()
        moved = RowBatch.of(batch.sources, [slow.row_of(batch, row) for row in order])
        moved_asked = take_rows(asked, order)
        scores, moved_scores = backend.fused_scores(batch), backend.fused_scores(moved)
        got, moved_got = backend.pick(batch, asked), backend.pick(moved, moved_asked)
        for place, row in enumerate(order):
            assert_same_bits(moved_scores[place], scores[row])
            assert_same_picks(got, row, moved_got, place, asked)

    check()


@pytest.mark.parametrize("model", [0, 1, 2])
def test_a_constant_in_a_models_logits_changes_nothing(backend: Backend, model: int) -> None:
    """Softmax is blind to it, and so is a sum of them."""
    generator = torch.Generator().manual_seed(model)
    values = [logits(generator, 500, "smooth")[None] for _ in range(3)]
    rows = [
        Row(Ref(0, 0), 500, (Term(Ref(1, 0), Ref(2, 0), 0.8),)),
        Row(Ref(0, 0), 499, (Term(Ref(1, 0), None, 0.5),), base_weight=0.7),
        Row(Ref(0, 0), 500, (Term(Ref(1, 0), Ref(2, 0), 0.8),), one_sided=True),
    ]

    def law(constant: float) -> tuple[Tensor, list[int]]:
        shifted = [held + constant * (number == model) for number, held in enumerate(values)]
        batch = RowBatch.of([spread(list(held), torch.float32, 2, 0, 0.0) for held in shifted], rows)
        asked = replace(PickControls.greedy(3), temperature=torch.ones(3), seeds=ints([1, 2, 3]))
        return torch.log_softmax(backend.fused_scores(batch), dim=1), backend.pick(
            batch, asked
        ).tokens.tolist()

    plain, tokens = law(0.0)
    shifted, shifted_tokens = law(64.0)
    torch.testing.assert_close(shifted, plain, atol=2e-4, rtol=0)
    assert shifted_tokens == tokens


@pytest.mark.parametrize("weight", [0.0, 1.0, -2.5, 1e4])
def test_a_difference_of_nothing_is_the_base(backend: Backend, weight: float) -> None:
    """Positive and negative the same row: bit for bit the base, for any weight."""
    generator = torch.Generator().manual_seed(8)
    width = 300
    held = spread(
        [logits(generator, width, shape) for shape in ("smooth", "holes")], torch.bfloat16, 1, 0, 1e30
    )
    term = Term(Ref(0, 1), Ref(0, 1), weight)
    batch = RowBatch.of([held], [Row(Ref(0, 0), width), Row(Ref(0, 0), width, (term, term))])
    scores = backend.fused_scores(batch)
    assert_same_bits(scores[0], scores[1])
    asked = replace(PickControls.greedy(2), temperature=torch.ones(2), seeds=ints([5, 5]), raw=(3, 3))
    got = backend.pick(batch, asked)
    assert got.tokens[0] == got.tokens[1] and not got.flips[1] and abs(float(got.kl[1])) < 1e-6
    assert got.raw is not None
    assert_same_logprobs(got.raw, 0, got.raw, 1, 3)


def test_what_lies_beyond_the_width_is_not_read(backend: Backend) -> None:
    """Garbage in the columns after a row's own changes no bit."""
    generator = torch.Generator().manual_seed(11)
    rows = [logits(generator, width, "smooth") for width in (257, 40, 256)]
    term = Term(Ref(0, 0), Ref(0, 2), 1.5)
    described = [
        Row(Ref(0, 0), 256, (term,)),
        Row(Ref(0, 1), 40, (term,), normalise=True, support=Support((Ref(0, 1),), top_p=0.8)),
        Row(Ref(0, 2), 200, (Term(Ref(0, 0)),), power=-1.0),
    ]
    asked = replace(PickControls.greedy(3), temperature=torch.ones(3), raw=(3,) * 3, processed=(3,) * 3)
    results = []
    for garbage in (0.0, float("nan"), 1e30):
        batch = RowBatch.of([spread(rows, torch.float32, 60, 4, garbage)], described)
        results.append((backend.fused_scores(batch), backend.pick(batch, asked)))
    for scores, got in results[1:]:
        assert_same_bits(scores, results[0][0])
        for row in range(3):
            assert_same_picks(results[0][1], row, got, row, asked)


def test_weights_may_be_replaced(backend: Backend) -> None:
    """`with_weights` on the device of the logits, as a solver leaves them."""
    generator = torch.Generator().manual_seed(12)
    held = spread([logits(generator, 40, "smooth") for _ in range(3)], torch.float32, 0, 0, 0.0)
    row = Row(Ref(0, 0), 40, (Term(Ref(0, 1), Ref(0, 2), 1.0),))
    batch = RowBatch.of([held], [row, row]).with_weights(floats([[0.25], [2.0]]).to(held.device))
    scores = backend.fused_scores(batch)
    for number in range(2):
        expected = slow.fused_scores(batch, number)
        assert float((scores[number, :40].cpu() - expected).abs().max()) < rounding(batch, number)
