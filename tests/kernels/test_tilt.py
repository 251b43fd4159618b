"""Tilted laws, divergences, moments and solved weights of both backends, against the slow twin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from proxyserve_kernels import Backend, Match, PickControls, Ref, Row, RowBatch, Solution, SolveControls, Term
from proxyserve_kernels import reference as slow
from tests.kernels.strategies import (
    DTYPES,
    GARBAGE,
    batches,
    examples,
    floats,
    interpreted,
    ints,
    logits,
    source,
    spread,
    widths_for,
)

INF = math.inf
SOLVED = (Match.FORWARD, Match.REVERSE, Match.BOTH, Match.BUDGET)


def asked(matches: Sequence[Match], largest: float = 20.0, budget: float = 0.3) -> SolveControls:
    return SolveControls(
        ints(list(matches)), floats([largest] * len(matches)), floats([budget] * len(matches))
    )


def family(seed: int, width: int, rows: int, weight: float = 1.0, terms: int = 1) -> RowBatch:
    """Rows as models give them: a tuned and an untuned model that differ by less than either from the base."""
    generator = torch.Generator().manual_seed(seed)
    base = [2 * torch.randn(width, generator=generator) for _ in range(rows)]
    untuned = [held + torch.randn(width, generator=generator) for held in base for _ in range(terms)]
    tuned = [held + 0.7 * torch.randn(width, generator=generator) for held in untuned]
    sources = [spread(held, torch.float32, 3, 0, math.nan) for held in (base, tuned, untuned)]
    return RowBatch.of(
        sources,
        [
            Row(
                Ref(0, r),
                width,
                tuple(
                    Term(Ref(1, r * terms + t), Ref(2, r * terms + t), weight / (t + 1)) for t in range(terms)
                ),
            )
            for r in range(rows)
        ],
    )


# Tilts, divergences, moments ----------------------------------------------------------------------------------------


@st.composite
def tilted(draw: st.DrawFn, widths: Sequence[int]) -> tuple[RowBatch, Tensor]:
    shapes = ("smooth", "sharp", "ties", "equal", "holes", "shifted")
    batch = draw(batches(widths, rules=False, shapes=shapes, huge=False))
    points = [[draw(st.sampled_from((0.0, 0.1, 1.0, 3.0))) for _ in range(3)] for _ in range(batch.size)]
    return batch, floats(points)


def spread_of_delta(batch: RowBatch, row: int) -> float:
    """The widest range that the row's d has over the tokens that its base allows, nats."""
    spec = slow.row_of(batch, row)
    possible = slow.lane(batch, spec.base, spec.width) > -INF
    total = 0.0
    for term in spec.terms:
        own = slow.delta(batch, spec, term)[possible]
        total += abs(term.weight) * float(own.max() - own.min())
    return total


def size_of_delta(batch: RowBatch, row: int, *, weighted: bool = True) -> float:
    """The largest |d| that the row's terms can add up to, nats."""
    spec = slow.row_of(batch, row)
    return sum(
        (abs(term.weight) if weighted else 1.0) * float(slow.delta(batch, spec, term).abs().max())
        for term in spec.terms
    )


def test_tilts(backend: Backend) -> None:
    @examples(backend, 100, 6)
    @given(case=tilted(widths_for(backend)))
    def check(case: tuple[RowBatch, Tensor]) -> None:
        batch, points = case
        got = backend.tilt(batch, points)
        assert got.mean.shape == points.shape and got.mean.dtype == torch.float32
        for row in range(batch.size):
            width, size = spread_of_delta(batch, row) + 1e-3, size_of_delta(batch, row)
            for column, a in enumerate(points[row].tolist()):
                expected = slow.tilt(batch, row, a)
                # Rounding of d itself, then of weights exp(a d), then of central moments made of powers of d.
                relative = 2e-6 * (1 + a * (size + width))
                place = (row, column)
                assert float(got.log_partition[place]) == pytest.approx(
                    expected.log_partition, abs=1e-5 + relative * (1 + a * (width + size))
                )
                assert float(got.mean[place]) == pytest.approx(
                    expected.mean, abs=1e-5 + relative * width + 1e-6 * size
                )
                assert float(got.variance[place]) == pytest.approx(
                    expected.variance, abs=1e-5 + 2 * relative * width**2
                )
                assert float(got.third[place]) == pytest.approx(
                    expected.third, abs=1e-5 + 6 * relative * width**3
                )

    check()


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_derivatives_are_finite_differences(backend: Backend, weight: float) -> None:
    batch = family(1, 257, 2, weight)
    step = 0.05
    points = [0.4 + step * offset for offset in (-2, -1, 0, 1, 2)]
    got = backend.tilt(batch, floats([points] * 2))
    for row in range(2):
        a, first, second = (values[row].double() for values in (got.log_partition, got.mean, got.variance))

        def slope(values: Tensor) -> float:
            return float((values[0] - 8 * values[1] + 8 * values[3] - values[4]) / (12 * step))

        assert float(got.mean[row, 2]) == pytest.approx(slope(a), abs=2e-4)
        assert float(got.variance[row, 2]) == pytest.approx(slope(first), abs=2e-4)
        assert float(got.third[row, 2]) == pytest.approx(slope(second), abs=2e-3)


def test_a_tilt_of_one_is_the_fused_law(backend: Backend) -> None:
    batch = family(2, 300, 2, 0.8, terms=2)
    got = backend.tilt(batch, torch.ones(2, 1))
    fused = backend.fused_scores(batch).double()
    for row in range(2):
        base = slow.lane(batch, slow.row_of(batch, row).base, 300)
        expected = torch.logsumexp(fused[row].cpu(), dim=0) - torch.logsumexp(base, dim=0)
        assert float(got.log_partition[row, 0]) == pytest.approx(float(expected), abs=1e-5)


def test_pair_divergences(backend: Backend) -> None:
    @examples(backend, 80, 5)
    @given(
        batch=batches(
            widths_for(backend), rules=False, huge=False, shapes=("smooth", "ties", "holes", "shifted")
        )
    )
    def check(batch: RowBatch) -> None:
        got = backend.pair_divergences(batch)
        assert got.forward.shape == got.reverse.shape == (batch.size, batch.terms)
        for row in range(batch.size):
            expected = slow.pair_divergences(batch, row)
            # A few roundings of the largest logit, or of a divergence of many nats.
            slack = 3e-5 + 1e-6 * size_of_delta(batch, row, weighted=False)
            for mine, other in ((got.forward, expected.forward), (got.reverse, expected.reverse)):
                torch.testing.assert_close(mine[row].cpu().double(), other, atol=slack, rtol=1e-5)

    check()


def test_small_divergences_are_not_lost(backend: Backend) -> None:
    """Two models that hardly differ, with large logits in common."""
    generator = torch.Generator().manual_seed(3)
    untuned = 3 * torch.randn(1000, generator=generator)
    held = spread(
        [untuned, untuned + 0.01 * torch.randn(1000, generator=generator)], torch.float32, 0, 0, 0.0
    )
    batch = RowBatch.of([held], [Row(Ref(0, 0), 1000, (Term(Ref(0, 1), Ref(0, 0)),))])
    got, expected = backend.pair_divergences(batch), slow.pair_divergences(batch, 0)
    assert float(got.forward[0, 0]) == pytest.approx(float(expected.forward[0]), rel=0.02)
    assert float(got.reverse[0, 0]) == pytest.approx(float(expected.reverse[0]), rel=0.02)


def test_moments(backend: Backend) -> None:
    @examples(backend, 80, 5)
    @given(
        batch=batches(
            widths_for(backend),
            rules=False,
            huge=False,
            shapes=("smooth", "ties", "equal", "holes", "shifted"),
        )
    )
    def check(batch: RowBatch) -> None:
        got = backend.moments(batch)
        T = batch.terms
        assert got.gradient.shape == (batch.size, T) and got.covariance.shape == (batch.size, T, T)
        for row in range(batch.size):
            expected = slow.moments(batch, row)
            width, size = 12.0 + spread_of_delta(batch, row), 1 + size_of_delta(batch, row)
            deltas = 1 + 350.0 * any(term.negative is None for term in slow.row_of(batch, row).terms)
            slack = 4e-6 * (width + size)
            assert float(got.log_partition[row]) == pytest.approx(expected.log_partition, abs=slack)
            torch.testing.assert_close(
                got.gradient[row].cpu().double(),
                expected.gradient,
                atol=slack * 60 + 1e-6 * deltas,
                rtol=1e-5,
            )
            torch.testing.assert_close(
                got.covariance[row].cpu().double(), expected.covariance, atol=slack * 3600, rtol=1e-4
            )

    check()


def test_moments_of_ordinary_rows(backend: Backend) -> None:
    """Tighter than the random rows allow; rows with fewer terms have zeros for the rest."""
    batch = family(5, 300, 1, 0.7, terms=4)
    spec = slow.row_of(batch, 0)
    batch = RowBatch.of(batch.sources, [spec, spec._replace(terms=spec.terms[:1]), spec._replace(terms=())])
    got = backend.moments(batch)
    for row in range(3):
        expected = slow.moments(batch, row)
        assert float(got.log_partition[row]) == pytest.approx(expected.log_partition, abs=1e-5)
        torch.testing.assert_close(got.gradient[row].cpu().double(), expected.gradient, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            got.covariance[row].cpu().double(), expected.covariance, atol=1e-5, rtol=1e-4
        )
    assert (
        not got.gradient[2].any() and not got.covariance[1, 1:].any() and not got.covariance[1, :, 1:].any()
    )


def test_moments_are_for_four_terms(backend: Backend) -> None:
    with pytest.raises(ValueError, match="4"):
        backend.moments(family(5, 31, 1, terms=5))


# Solutions ----------------------------------------------------------------------------------------------------------


def assert_solves(batch: RowBatch, controls: SolveControls, got: Solution, tolerance: float = 1e-4) -> None:
    """Every row of `got` is the bisected one."""
    for row in range(batch.size):
        expected = slow.solve(batch, controls, row)
        where = (row, Match(int(controls.match[row])), expected, float(got.multiplier[row]))
        scale = max(1.0, expected.multiplier)
        assert float(got.multiplier[row]) == pytest.approx(expected.multiplier, abs=tolerance * scale), where
        assert bool(got.converged[row]) == expected.converged, where
        assert float(got.forward[row]) == pytest.approx(expected.forward, abs=tolerance, rel=1e-3), where
        assert float(got.reverse[row]) == pytest.approx(expected.reverse, abs=tolerance, rel=1e-3), where
        size = float(expected.weights.abs().max()) if expected.weights.numel() else 1.0
        torch.testing.assert_close(
            got.weights[row].cpu().double(), expected.weights, atol=tolerance * max(scale, size), rtol=0
        )


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("weight", [1.0, -0.5, 2.0])
def test_every_match(backend: Backend, weight: float, terms: int) -> None:
    """One batch with all kinds of rows in it."""
    rows = 6 if interpreted(backend) else 12
    batch = family(int(10 * weight) + terms + 100, 300, rows, weight, terms)
    controls = asked([Match(row % 6) for row in range(rows)])
    assert_solves(batch, controls, backend.solve(batch, controls))


def test_random_rows(backend: Backend) -> None:
    """Divergences from nearly nothing to several nats, sharp and flat bases."""

    @examples(backend, 60, 3)
    @given(
        seed=st.integers(0, 10**6),
        width=st.sampled_from([width for width in widths_for(backend) if width >= 31]),
        sharpness=st.sampled_from((0.5, 2.0, 5.0)),
        size=st.sampled_from((0.1, 1.0, 2.5)),
        dtype=st.sampled_from(DTYPES),
        garbage=st.sampled_from(GARBAGE),
    )
    def check(
        seed: int, width: int, sharpness: float, size: float, dtype: torch.dtype, garbage: float
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        untuned = [sharpness * torch.randn(width, generator=generator) for _ in range(3)]
        tuned = [held + size * torch.randn(width, generator=generator) for held in untuned]
        base = [held + torch.randn(width, generator=generator) for held in untuned]
        sources = [spread(held, dtype, 5, 1, garbage) for held in (base, tuned, untuned)]
        batch = RowBatch.of(sources, [Row(Ref(0, r), width, (Term(Ref(1, r), Ref(2, r)),)) for r in range(3)])
        controls = asked([Match.FORWARD, Match.REVERSE, Match.BUDGET], budget=size**2 / 4)
        got = backend.solve(batch, controls)
        for row in range(3):
            expected = slow.solve(batch, controls, row)
            if expected.forward < 1e-3:
                continue  # float32 logits do not say more of such a divergence than its order
            assert bool(got.converged[row]) == expected.converged
            assert float(got.multiplier[row]) == pytest.approx(expected.multiplier, rel=1e-3, abs=1e-4)
            assert float(got.forward[row]) == pytest.approx(expected.forward, rel=1e-3, abs=1e-4)
            assert float(got.reverse[row]) == pytest.approx(expected.reverse, rel=1e-3, abs=1e-4)

    check()


@pytest.mark.parametrize("match", [Match.FORWARD, Match.REVERSE, Match.BOTH, Match.PAPER])
def test_the_untuned_model_as_base_needs_its_weight_unchanged(backend: Backend, match: Match) -> None:
    """If the base is the untuned model, the tuned one is the law to reach, at multiplier 1."""
    generator = torch.Generator().manual_seed(9)
    untuned = logits(generator, 300, "smooth")
    held = spread([untuned, untuned + logits(generator, 300, "smooth") / 2], torch.float32, 1, 0, 0.0)
    batch = RowBatch.of([held], [Row(Ref(0, 0), 300, (Term(Ref(0, 1), Ref(0, 0)),))] * 2)
    got = backend.solve(batch, asked([match, Match.NONE]))
    assert got.multiplier.tolist() == pytest.approx([1.0, 1.0], abs=2e-4)
    assert got.weights[:, 0].tolist() == pytest.approx([1.0, 1.0], abs=2e-4)
    assert got.converged.all()
    expected = slow.pair_divergences(batch, 0)
    assert float(got.forward[0]) == pytest.approx(float(expected.forward[0]), abs=1e-4, rel=1e-3)
    assert float(got.reverse[0]) == pytest.approx(float(expected.reverse[0]), abs=1e-4, rel=1e-3)
    assert got.forward[1] == got.reverse[1] == 0, "not looked at"


@pytest.mark.parametrize("match", SOLVED)
def test_the_largest_multiplier_is_a_limit(backend: Backend, match: Match) -> None:
    """Reached first: the row stays there and says so; its neighbours are solved."""
    batch = family(11, 257, 3)
    free = asked([match] * 3)
    low = replace(free, max_weight=floats([20.0, 0.05, 20.0]))
    got = backend.solve(batch, low)
    assert got.converged.tolist() == [True, False, True]
    assert float(got.multiplier[1]) == pytest.approx(0.05, rel=1e-6)
    assert_solves(batch, low, got)


def test_a_budget_is_kept(backend: Backend) -> None:
    """KL(fused || base) at the found weights is the budget, for small ones and large ones."""
    budgets = [0.001, 0.05, 0.5, 2.0]
    batch = family(12, 500, 4)
    controls = replace(asked([Match.BUDGET] * 4, largest=100.0), budget=floats(budgets))
    got = backend.solve(batch, controls)
    assert got.converged.all()
    spent = batch.with_weights(got.weights.cpu())
    for row, budget in enumerate(budgets):
        assert slow.kl(slow.raw_law(spent, row), slow.reference_law(spent, row)) == pytest.approx(
            budget, rel=1e-3
        )


def test_a_budget_that_is_never_spent(backend: Backend) -> None:
    """A difference of nothing moves nothing, however far it is followed."""
    held = source([0.0, 1.0, 2.0], [0.5, 0.0, 1.0])
    batch = RowBatch.of([held], [Row(Ref(0, 0), 3, (Term(Ref(0, 1), Ref(0, 1)),))])
    got = backend.solve(batch, asked([Match.BUDGET], largest=7.0))
    assert got.multiplier.tolist() == [7.0] and got.converged.tolist() == [False]
    assert float(got.forward[0]) == pytest.approx(0.0, abs=1e-6)


def test_the_papers_grid_written_out(backend: Backend) -> None:
    """Two terms: 21 weights of either, the best objective of all 42; the row's own weights do not count."""
    rows = 3
    batch = family(13, 128, rows, weight=-3.0, terms=2)
    got = backend.solve(batch, asked([Match.PAPER] * rows, largest=0.5))
    for row in range(rows):
        pairs = slow.pair_divergences(batch, row)
        tries = []
        for term in range(2):
            for point in range(21):
                weights = torch.zeros(rows, 2)
                weights[row, term] = point / 10
                tried = batch.with_weights(weights)
                law, base = slow.raw_law(tried, row), slow.reference_law(tried, row)
                forward, reverse = slow.kl(law, base), slow.kl(base, law)
                miss = sum(
                    (forward - float(pairs.forward[other])) ** 2
                    + (reverse - float(pairs.reverse[other])) ** 2
                    for other in range(2)
                )
                tries.append((miss, term, point / 10, forward, reverse))
        _, term, weight, forward, reverse = min(tries)
        expected = [0.0, 0.0]
        expected[term] = weight
        assert got.weights[row].tolist() == pytest.approx(expected)
        assert float(got.multiplier[row]) == pytest.approx(weight)
        assert float(got.forward[row]) == pytest.approx(forward, abs=1e-4)
        assert float(got.reverse[row]) == pytest.approx(reverse, abs=1e-4)


def test_the_papers_ties_go_to_the_first_term(backend: Backend) -> None:
    batch = family(14, 64, 1)
    spec = slow.row_of(batch, 0)
    batch = RowBatch.of(batch.sources, [spec._replace(terms=spec.terms * 2)])
    got = backend.solve(batch, asked([Match.PAPER]))
    assert got.weights[0, 0] > 0 and got.weights[0, 1] == 0


@pytest.mark.parametrize("match", [Match.FORWARD, Match.BOTH, Match.BUDGET, Match.PAPER])
def test_a_bad_row_is_flagged_alone(backend: Backend, match: Match) -> None:
    generator = torch.Generator().manual_seed(15)
    good = [logits(generator, 40, "smooth")]
    good += [good[0] + 0.5 * torch.randn(40, generator=generator) for _ in range(2)]
    bad = good[1].clone()
    bad[17] = math.nan
    held = spread([*good, bad], torch.float32, 0, 0, 0.0)
    rows = [
        Row(Ref(0, 0), 40, (Term(Ref(0, positive), Ref(0, negative)),))
        for positive, negative in ((1, 2), (3, 2), (1, 3), (1, 2))
    ]
    batch = RowBatch.of([held], [*rows, rows[0]._replace(base=Ref(0, 3))])
    got = backend.solve(batch, asked([match] * 5, largest=50.0))
    assert got.converged.tolist() == [True, False, False, True, False]
    assert got.multiplier[0] == got.multiplier[3] and math.isfinite(float(got.multiplier[0]))
    alone = backend.solve(RowBatch.of([held], rows[:1]), asked([match], largest=50.0))
    assert alone.multiplier[0] == got.multiplier[0]


def test_rows_of_none_keep_their_weights(backend: Backend) -> None:
    batch = family(16, 31, 2, weight=-0.7, terms=2)
    got = backend.solve(batch, asked([Match.NONE] * 2))
    assert torch.equal(got.weights.cpu(), batch.weights) and got.multiplier.tolist() == [1.0, 1.0]
    assert got.forward.tolist() == got.reverse.tolist() == [0.0, 0.0] and got.converged.all()


def test_the_solved_weights_are_used_as_they_are(backend: Backend) -> None:
    """From solver to pick without a detour: a row at its forward target has that KL from its base."""
    batch = family(17, 256, 2)
    got = backend.solve(batch, asked([Match.FORWARD] * 2))
    solved = batch.with_weights(got.weights)
    kl = backend.pick(solved, PickControls.greedy(2)).kl
    targets = backend.pair_divergences(batch).forward[:, 0]
    torch.testing.assert_close(kl, targets, rtol=1e-3, atol=1e-4)
