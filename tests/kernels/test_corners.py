"""Corners that a review found, each once wrong in one of the backends."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from proxyserve_kernels import Backend, Match, PickControls, Ref, Row, RowBatch, SolveControls, Support, Term
from tests.kernels.strategies import DEVICE, interpreted


def plain(scores: Tensor) -> RowBatch:
    return RowBatch.of(
        [scores.to(DEVICE)], [Row(Ref(0, row), scores.shape[1]) for row in range(scores.shape[0])]
    )


def sampled(rows: int, **changes: object) -> PickControls:
    return replace(PickControls.greedy(rows), temperature=torch.ones(rows), **changes)  # type: ignore[arg-type]


def noise(rows: int, width: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_whole_block_of_nan_is_seen(backend: Backend, top_k: int) -> None:
    scores = noise(3, 512)
    scores[1, :256] = math.nan
    picks = backend.pick(plain(scores), sampled(3, top_k=torch.full((3,), top_k)))
    assert picks.valid.tolist() == [True, False, True] and picks.tokens[1] == -1


@pytest.mark.parametrize("bad", [[0.0, math.nan, 2.0], [math.nan] * 3])
@pytest.mark.parametrize("outside", ["mask", "base"])
def test_a_nan_in_a_support_law_is_seen(backend: Backend, bad: list[float], outside: str) -> None:
    law = torch.tensor([[1.0, 2.0, 3.0], bad], device=DEVICE)
    rows = [Row(Ref(0, 0), 3, support=Support((Ref(0, row),), top_k=1, outside=outside)) for row in (0, 1)]  # type: ignore[arg-type]
    picks = backend.pick(RowBatch.of([law], rows), PickControls.greedy(2))
    assert picks.valid.tolist() == [True, False]


@pytest.mark.parametrize(("positive", "negative"), [(-math.inf, math.nan), (math.nan, -math.inf)])
def test_a_nan_beside_an_infinity_is_seen(backend: Backend, positive: float, negative: float) -> None:
    lanes = torch.tensor([[0.0, 1.0], [positive, 0.0], [negative, 0.0]], device=DEVICE)
    batch = RowBatch.of([lanes], [Row(Ref(0, 0), 2, (Term(Ref(0, 1), Ref(0, 2)),)), Row(Ref(0, 0), 2)])
    assert backend.pick(batch, PickControls.greedy(2)).valid.tolist() == [False, True]


@pytest.mark.parametrize("top_k", [10, 2**31 - 1, 2**31, 2**33 + 1])
def test_a_huge_top_k_keeps_everything(backend: Backend, top_k: int) -> None:
    asked = sampled(1, top_k=torch.tensor([top_k]), processed=(10,))
    processed = backend.pick(plain(noise(1, 10)), asked).processed
    assert processed is not None and sorted(processed.ids[0].tolist()) == list(range(10))


@pytest.mark.parametrize("power", [0.0, 1.0, -1.0, math.inf, -math.inf])
def test_a_power_mean_of_nothing_is_bad(backend: Backend, power: float) -> None:
    row = Row(Ref(0, 0), 3, (Term(Ref(0, 1), None, 0.0),), base_weight=0.0, power=power)
    batch = RowBatch.of([torch.randn(2, 3, device=DEVICE)], [row])
    assert torch.isneginf(backend.fused_scores(batch)[0]).all()
    assert not backend.pick(batch, PickControls.greedy(1)).valid[0]


@pytest.mark.parametrize("match", [Match.FORWARD, Match.REVERSE, Match.BOTH])
def test_equal_twins_are_solved(backend: Backend, match: Match) -> None:
    lanes = noise(6, 300).to(DEVICE)
    rows = [Row(Ref(0, row), 300, (Term(Ref(0, row), Ref(0, row), 0.7),)) for row in range(6)]
    wishes = SolveControls(torch.full((6,), int(match)), torch.full((6,), 2.0), torch.zeros(6))
    solution = backend.solve(RowBatch.of([lanes], rows), wishes)
    assert solution.converged.all() and (solution.forward.abs() < 1e-6).all()


def test_a_forced_token_beyond_the_batch(backend: Backend) -> None:
    asked = replace(PickControls.greedy(2), raw=(0, 0), forced=torch.tensor([300, 1]))
    raw = backend.pick(plain(noise(2, 256)), asked).raw
    assert raw is not None
    assert torch.isneginf(raw.chosen[0]) and raw.ranks[0] == -1 and torch.isfinite(raw.chosen[1])


def test_long_lists_of_a_neighbour_change_no_nucleus(backend: Backend) -> None:
    """At borders of a nucleus: shares that are exactly the mass of the first tokens, or the next float."""
    width, rows = (512, 6) if interpreted(backend) else (2048, 12)
    scores = noise(1, width).expand(rows, -1).contiguous()
    law = torch.softmax(scores[0].double(), dim=0).sort(descending=True).values.cumsum(dim=0).float()
    shares = torch.stack(
        [law[4 * row] if row % 2 else torch.nextafter(law[4 * row], law[-1]) for row in range(rows)]
    )

    def kept(wanted: list[int | None]) -> list[float]:
        processed = backend.pick(
            plain(scores), sampled(rows, top_p=shares, processed=tuple(wanted))
        ).processed
        assert processed is not None
        return processed.chosen[: rows - 1].tolist()

    assert kept([0] * rows) == kept([0] * (rows - 1) + [300])


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.9}, {"top_p": 0.5}, {"min_p": 0.01}, {"top_k": 150, "top_p": 0.8}]
)
def test_rows_that_keep_more_than_is_sorted(settings: dict[str, float], torch_backend: Backend) -> None:
    """The bisection of the Triton backend, on rows small enough to interpret: it sorts 32 tokens only."""
    pytest.importorskip("triton")
    from proxyserve_kernels.triton_backend.backend import TritonBackend

    rows = 6
    scores = noise(rows, 600, seed=4) * torch.tensor([0.1, 0.3, 0.5, 0.7, 0.3, 0.0])[:, None]
    asked = sampled(
        rows,
        seeds=torch.arange(rows),
        top_k=torch.full((rows,), int(settings.get("top_k", 0))),
        top_p=torch.full((rows,), settings.get("top_p", 1.0)),
        min_p=torch.full((rows,), settings.get("min_p", 0.0)),
        processed=(3,) * rows,
    )
    small, twin = TritonBackend(torch.device(DEVICE), room=32), torch_backend
    got, expected = small.pick(plain(scores), asked), twin.pick(plain(scores), asked)
    assert torch.equal(got.tokens, expected.tokens)
    assert got.processed is not None and expected.processed is not None
    torch.testing.assert_close(got.processed.values, expected.processed.values, atol=2e-5, rtol=1e-5)
    assert torch.equal(got.processed.ids, expected.processed.ids)
