"""The batched kernels against their slow float64 twin, over awkward shapes, filters, ties and infinities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proxyserve_kernels import Adjustments, DeltaGroup, PickControls, Picks, RowBatch, fuse, fuse_and_pick
from proxyserve_kernels.draw import draw
from proxyserve_kernels.filters import apply_filters
from proxyserve_kernels.reference import draw_one, fused_log_probs, kept_ids

WIDTHS = (1, 2, 31, 255, 256, 257, 1000)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def controls(rows: int, **changes: list[float]) -> PickControls:
    """Greedy for every row unless changed."""
    values: dict[str, list[float]] = {
        "temperature": [0.0] * rows,
        "top_k": [0] * rows,
        "top_p": [1.0] * rows,
        "min_p": [0.0] * rows,
        "seeds": list(range(rows)),
        "positions": [7] * rows,
        **changes,
    }
    integer = ("top_k", "seeds", "positions")
    tensors = {
        name: torch.tensor(value, dtype=torch.int64 if name in integer else torch.float32)
        for name, value in values.items()
    }
    return PickControls(**tensors, want_logprobs=(3,) * rows)


def mixed_batch(generator: torch.Generator, widths: list[int], dtype: torch.dtype) -> RowBatch:
    """Rows with no, one and two terms out of models whose heads have different widths."""
    rows = len(widths)
    most = max(widths)

    def logits(count: int, padding: int) -> Tensor:
        return (5 * torch.randn(count, most + padding, generator=generator)).to(dtype)

    first = [row for row in range(rows) if row % 3 > 0]
    second = [row for row in range(rows) if row % 3 == 2]
    groups = [
        DeltaGroup(
            ints(members),
            torch.randn(len(members), generator=generator),
            logits(len(members) + 1, 3),
            ints([len(members) - i for i in range(len(members))]),
            logits(len(members), 9),
            ints(list(range(len(members)))),
        )
        for members in (first, second)
        if members
    ]
    return RowBatch(logits(rows + 2, 5), ints([rows + 1 - r for r in range(rows)]), widths, groups)


def reference_law(batch: RowBatch, row: int) -> Tensor:
    terms = []
    for group in batch.groups:
        for index, member in enumerate(group.rows.tolist()):
            if member == row:
                assert group.negative is not None and group.negative_rows is not None
                terms.append(
                    (
                        float(group.weights[index]),
                        group.positive[group.positive_rows[index]],
                        group.negative[group.negative_rows[index]],
                    )
                )
    return fused_log_probs(batch.base[batch.base_rows[row]], terms, batch.widths[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_fusion_of_a_mixed_batch(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    widths = [max(1, width - row % 4) for row in range(7)]
    batch = mixed_batch(generator, widths, dtype)
    fused, base = fuse(batch)
    picks = fuse_and_pick(batch, controls(7))
    for row, own in enumerate(widths):
        law = reference_law(batch, row)
        got = torch.log_softmax(fused[row], dim=0)
        assert torch.isneginf(got[own:]).all() and torch.isneginf(base[row, own:]).all()
        torch.testing.assert_close(got[:own].double(), law, atol=2e-5, rtol=1e-5)
        plain = torch.log_softmax(batch.base[batch.base_rows[row], :own].double(), dim=0)
        assert picks.kl[row].item() == pytest.approx(float((law.exp() * (law - plain)).sum()), abs=1e-4)
        assert picks.flips[row].item() == (int(law.argmax()) != int(plain.argmax()))
        assert picks.tokens[row] == law.argmax()
        entry = picks.logprobs[row]
        assert entry is not None
        assert entry[0] == entry[2][0] == pytest.approx(law.max().item(), abs=2e-5)
        assert entry[1] == law.topk(min(3, own)).indices.tolist()


def subset(batch: RowBatch, row: int) -> RowBatch:
    """The same row alone, with tensors of its own."""
    groups = []
    for group in batch.groups:
        for index, member in enumerate(group.rows.tolist()):
            if member == row:
                assert group.negative is not None and group.negative_rows is not None
                groups.append(
                    DeltaGroup(
                        ints([0]),
                        group.weights[index : index + 1],
                        group.positive[group.positive_rows[index]][None].clone(),
                        ints([0]),
                        group.negative[group.negative_rows[index]][None].clone(),
                        ints([0]),
                    )
                )
    return RowBatch(batch.base[batch.base_rows[row]][None].clone(), ints([0]), [batch.widths[row]], groups)


def test_a_row_alone_is_the_row_in_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = mixed_batch(generator, [700] * 9, torch.float32)
    settings_of_rows = {
        "temperature": [0.0, 1.0, 0.7] * 3,
        "top_k": [0, 5, 0] * 3,
        "top_p": [1.0, 1.0, 0.9] * 3,
    }
    together = fuse_and_pick(batch, controls(9, **settings_of_rows))
    fused, _ = fuse(batch)
    for row in range(9):
        own = {name: [values[row]] for name, values in settings_of_rows.items()}
        alone = fuse_and_pick(subset(batch, row), controls(1, seeds=[row], **own))
        assert alone.tokens[0] == together.tokens[row]
        torch.testing.assert_close(fuse(subset(batch, row))[0][0], fused[row], atol=0, rtol=0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    width=st.sampled_from((2, 31, 256, 600)),
    seed=st.integers(0, 10**6),
    top_k=st.sampled_from((0, 1, 3, 40, 599, 5000)),
    top_p=st.sampled_from((1e-7, 0.3, 0.9, 0.999, 1.0)),
    min_p=st.sampled_from((0.0, 1e-6, 0.1, 1.0)),
    shape=st.sampled_from(("sharp", "flat", "equal", "ties", "holes")),
)
def test_filters(width: int, seed: int, top_k: int, top_p: float, min_p: float, shape: str) -> None:
    scores = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    match shape:
        case "sharp":
            scores = scores * 8
        case "flat":
            scores = scores * 0.01
        case "equal":
            scores = torch.zeros(width)
        case "ties":
            scores = scores.round()
        case "holes":
            scores[:: 2 + seed % 5] = -math.inf
    filtered = scores.clone()[None]
    apply_filters(filtered, ints([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    kept = set((filtered[0] > -math.inf).nonzero()[:, 0].tolist())
    expected = [token for token in kept_ids(scores, top_k, top_p, min_p) if scores[token] > -math.inf]
    law = torch.softmax(scores.double(), dim=0)
    order = [token for token in kept_ids(scores, top_k, 1.0, min_p) if scores[token] > -math.inf]
    total = sum(float(law[token]) for token in order)
    for token in kept.symmetric_difference(expected):
        # Only where float32 cannot tell on which side of a threshold the token lies.
        before = sum(float(law[other]) for other in order[: order.index(token)]) if token in order else 0.0
        at_nucleus = abs(before - top_p * total) < 1e-6
        at_floor = abs(float(law[token]) - min_p * float(law.max())) < 1e-6 * float(law.max())
        assert at_nucleus or at_floor


@pytest.mark.parametrize("width", [1, 255, 256, 700])
def test_draws_are_those_of_the_reference(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    padded = -(-width // 256) * 256
    scores = torch.full((40, padded), -math.inf)
    scores[:, :width] = 2 * torch.randn(40, width, generator=generator)
    seeds = torch.randint(-(2**63), 2**63 - 1, (40,), generator=generator)
    positions = torch.randint(0, 10_000, (40,), generator=generator)
    drawn = draw(scores, seeds, positions)
    for row in range(40):
        assert drawn[row] == draw_one(scores[row, :width], int(seeds[row]), int(positions[row]))


def chi_square(counts: Tensor, law: Tensor) -> float:
    """Normalised so that it is about standard normal when counts come from law."""
    total = counts.sum()
    cells = law * total >= 5
    observed, expected = counts[cells].double(), (law * total)[cells].double()
    rest = (counts[~cells].sum().double(), (law[~cells] * total).sum().double())
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = int(cells.sum()) - 1
    if rest[1] >= 5:
        statistic = statistic + (rest[0] - rest[1]) ** 2 / rest[1]
        degrees += 1
    return float((statistic - degrees) / math.sqrt(2 * degrees))


@pytest.mark.parametrize("kind", ["positions", "seeds"])
def test_draws_follow_the_law(kind: str) -> None:
    """100,000 draws of one law with 600 tokens over three blocks, along positions of one seed and across seeds."""
    scores = torch.full((768,), -math.inf)
    scores[:600] = 2 * torch.randn(600, generator=torch.Generator().manual_seed(5))
    law = torch.softmax(scores.double(), dim=0)
    counts = torch.zeros(768)
    for start in range(0, 100_000, 10_000):
        index = torch.arange(start, start + 10_000)
        same = torch.full_like(index, 12345)
        seeds, positions = (same, index) if kind == "positions" else (index, same)
        counts += torch.bincount(draw(scores.expand(10_000, -1), seeds, positions), minlength=768)
    assert abs(chi_square(counts, law)) < 5
    assert chi_square(counts, torch.softmax(scores.double() * 1.15, dim=0)) > 5, "the test can fail"


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """A token 8 nats below another: about 1 in 3000; a uniform with too few bits would miss it."""
    scores = torch.full((256,), -math.inf)
    scores[3], scores[200] = 0.0, -8.0
    draws, found = 150_000, 0
    for start in range(0, draws, 10_000):
        index = torch.arange(start, start + 10_000)
        found += int((draw(scores.expand(10_000, -1), index, torch.zeros_like(index)) == 200).sum())
    expected = draws * math.exp(-8.0) / (1 + math.exp(-8.0))
    assert abs(found - expected) < 4 * math.sqrt(expected)


def pick_row(scores: list[float], **changes: list[float]) -> Picks:
    batch = RowBatch(torch.tensor([scores]), ints([0]), [len(scores)])
    return fuse_and_pick(batch, controls(1, **changes))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_bad_rows_fail_alone(bad: list[float], temperature: float) -> None:
    batch = RowBatch(torch.tensor([[0.0, 1.0], bad, [3.0, 1.0]]), ints([0, 1, 2]), [2, 2, 2])
    picks = fuse_and_pick(batch, controls(3, temperature=[0.0, temperature, 0.0]))
    assert picks.valid.tolist() == [True, False, True]
    assert picks.tokens.tolist() == [1, -1, 0]


def test_a_single_finite_token_is_always_drawn() -> None:
    for seed in range(50):
        picks = pick_row([-math.inf] * 4 + [-30.0] + [-math.inf] * 3, temperature=[1.0], seeds=[seed])
        assert picks.tokens.tolist() == [4] and picks.valid.tolist() == [True]


def test_ties_go_to_the_lowest_id() -> None:
    picks = pick_row([1.0, 2.0, 2.0, 0.0, 2.0])
    assert picks.tokens.tolist() == [1]
    assert picks.logprobs[0] is not None and picks.logprobs[0][1] == [1, 2, 4]


def test_infinities_in_a_pair_follow_the_policy() -> None:
    """Both out: the base alone; tuned rules out: far down; untuned rules out: far up; base rules out: stays out."""
    inf = math.inf
    base = torch.tensor([[0.0, 0.0, 0.0, -inf]])
    tuned = torch.tensor([[-inf, -inf, 0.0, 9.0]])
    untuned = torch.tensor([[-inf, 0.0, -inf, 0.0]])
    group = DeltaGroup(ints([0]), torch.tensor([1.0]), tuned, ints([0]), untuned, ints([0]))
    fused, _ = fuse(RowBatch(base, ints([0]), [4], [group]))
    assert fused[0, :4].tolist() == [0.0, -50.0, 50.0, -inf]


def test_bias_and_penalties() -> None:
    scores = [2.0, -1.0, 0.5, 0.0]
    adjustments = Adjustments(
        bias_rows=ints([0]),
        bias_ids=ints([3]),
        bias_values=torch.tensor([1.25]),
        seen_rows=ints([0, 0]),
        seen_ids=ints([0, 1]),
        counts=torch.tensor([3.0, 0.0]),
        repetition=torch.tensor([2.0, 2.0]),
        presence=torch.tensor([0.5, 0.5]),
        frequency=torch.tensor([0.1, 0.1]),
    )
    tensor = torch.tensor([scores])
    adjustments.apply(tensor)
    # 2/2 - 0.1*3 - 0.5; seen in the prompt only: multiplied, not penalised further; untouched; biased.
    assert tensor[0].tolist() == pytest.approx([0.2, -2.0, 0.5, 1.25])
