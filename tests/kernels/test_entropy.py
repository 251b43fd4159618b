"""Temperatures for entropy targets, of both backends, against bisection in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from proxyserve_kernels import Backend, Ref, Row, RowBatch, Support
from proxyserve_kernels import reference as slow
from proxyserve_kernels.entropy import MAX_TEMPERATURE, MIN_TEMPERATURE
from tests.kernels.strategies import DEVICE, batches, examples, widths_for
from tests.kernels.test_invariance import assert_same_bits

INF = math.inf


def entropies_at(batch: RowBatch, temperatures: Tensor) -> list[float]:
    return [
        slow.entropy(slow.log_softmax(slow.fused_scores(batch, row) / float(temperatures[row])))
        for row in range(batch.size)
    ]


def single(scores: list[float] | Tensor, **more: object) -> RowBatch:
    source = torch.as_tensor(scores, dtype=torch.float32)[None]
    return RowBatch.of([source], [Row(Ref(0, 0), source.shape[1], **more)])  # type: ignore[arg-type]


def test_entropy_is_at_its_target(backend: Backend) -> None:
    @examples(backend, 80, 6)
    @given(batch=batches(widths_for(backend)), share=st.floats(0.02, 0.98))
    def check(batch: RowBatch, share: float) -> None:
        targets = []
        for row in range(batch.size):
            possible = int((slow.fused_scores(batch, row) > -INF).sum())
            targets.append(share * math.log(possible) if possible > 1 else math.nan)
        found = backend.temperatures(batch, torch.tensor(targets)).cpu()
        reached = entropies_at(batch, found)
        for row, target in enumerate(targets):
            if math.isnan(target):
                assert math.isnan(found[row])
            elif MIN_TEMPERATURE * 1.01 < found[row] < MAX_TEMPERATURE * 0.99:
                # Where a law turns over a few ulps of its scores, float32 cannot say more.
                expected = slow.temperature(batch, row, target, MIN_TEMPERATURE, MAX_TEMPERATURE)
                close = abs(reached[row] - target) <= 1e-3 * target + 1e-5
                assert close or float(found[row]) == pytest.approx(expected, rel=1e-3)

    check()


@pytest.mark.parametrize("target", [1e-4, 0.01, 0.5, 2.0, 5.0, 7.5])
def test_against_bisection(backend: Backend, target: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 2000) * torch.tensor([0.3, 1.0, 3.0, 12.0])[:, None]
    batch = RowBatch.of([scores], [Row(Ref(0, row), 2000) for row in range(4)])
    found = backend.temperatures(batch, torch.full((4,), target)).cpu().double()
    expected = [slow.temperature(batch, row, target, MIN_TEMPERATURE, MAX_TEMPERATURE) for row in range(4)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


def test_masked_tokens_take_no_part(backend: Backend) -> None:
    scores = [5.0, 4.0, 3.0, -INF, 1.0, 0.0]
    supported = single(scores, support=Support((Ref(0, 0),), top_k=3))
    alone = single(scores[:3])
    target = torch.tensor([0.7])
    assert backend.temperatures(supported, target).item() == pytest.approx(
        backend.temperatures(alone, target).item(), rel=1e-5
    )


def test_what_cannot_be_reached_is_clamped(backend: Backend) -> None:
    scores = [3.0, 3.0, 1.0, 0.0]
    assert backend.temperatures(single(scores), torch.tensor([math.log(4)])).item() > 100
    assert backend.temperatures(single(scores), torch.tensor([9.0])).item() == pytest.approx(
        MAX_TEMPERATURE, rel=0.01
    )
    below_ties = backend.temperatures(single(scores), torch.tensor([0.5])).item()
    assert below_ties == pytest.approx(MIN_TEMPERATURE, rel=0.01)
    assert backend.temperatures(single(scores), torch.tensor([0.0])).item() == pytest.approx(
        MIN_TEMPERATURE, rel=0.01
    )


def test_broken_rows_and_those_that_do_not_ask(backend: Backend) -> None:
    scores = torch.tensor(
        [[1.0, 2.0, 3.0], [1.0, math.nan, 3.0], [1.0, INF, 3.0], [-INF, -INF, -INF], [1.0, 2.0, 3.0]]
    )
    batch = RowBatch.of([scores], [Row(Ref(0, row), 3) for row in range(5)])
    found = backend.temperatures(batch, torch.tensor([0.5, 0.5, 0.5, 0.5, math.nan]))
    assert found.isnan().tolist() == [False, True, True, True, True]
    assert found[0].item() == backend.temperatures(single(scores[0]), torch.tensor([0.5])).item()


def test_entropies_are_exact(backend: Backend) -> None:
    """Also those of almost nothing, where one token has nearly all of the law."""
    generator = torch.Generator().manual_seed(1)
    scores = (
        torch.randn(24, 1000, generator=generator) * torch.tensor([0.3, 1.0, 4.0])[torch.arange(24) % 3, None]
    )
    scores[::2, 7] += 12.0
    batch = RowBatch.of([scores.to(DEVICE)], [Row(Ref(0, row), 1000) for row in range(24)])
    targets = torch.tensor([1e-4, 1e-3, 0.02, 0.4, 1.5, 3.0, 5.0, 6.5])[torch.arange(24) // 3]
    found = backend.temperatures(batch, targets).cpu()
    assert entropies_at(batch, found) == pytest.approx(targets.tolist(), rel=1e-5)


def test_a_row_is_the_same_alone_and_in_a_batch(backend: Backend) -> None:
    """Bit for bit, with neighbours that are wider, take longer, are broken or do not ask."""

    @examples(backend, 40, 3)
    @given(batch=batches(widths_for(backend)), seed=st.integers(0, 1000))
    def check(batch: RowBatch, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        targets = 4 * torch.rand(batch.size, generator=generator) ** 3
        targets[torch.rand(batch.size, generator=generator) < 0.2] = math.nan
        together = backend.temperatures(batch, targets)
        for row in range(batch.size):
            alone = RowBatch.of(batch.sources, [slow.row_of(batch, row)])
            assert_same_bits(backend.temperatures(alone, targets[row : row + 1])[0], together[row])

    check()
