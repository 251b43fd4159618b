"""Draws follow their law, and the tests of that can fail. Torch only: the other backend draws the same tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from proxyserve_kernels import Backend, PickControls, Ref, Row, RowBatch, Term
from proxyserve_kernels import reference as slow
from tests.kernels.strategies import floats, source

CHUNK = 10_000


def chi_square(counts: Tensor, law: Tensor) -> float:
    """How far `counts` [V] are from probabilities `law` [V]: about standard normal if drawn from it."""
    counts = counts.double()
    total = counts.sum()
    cells = law * total >= 5
    observed, expected = counts[cells], (law * total)[cells]
    rest = (counts[~cells].sum(), (law[~cells] * total).sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = int(cells.sum()) - 1
    if rest[1] >= 5:
        statistic = statistic + (rest[0] - rest[1]) ** 2 / rest[1]
        degrees += 1
    return float((statistic - degrees) / math.sqrt(2 * degrees))


def tally(
    backend: Backend, row: Row, sources: list[Tensor], draws: int, kind: str, **filters: float
) -> Tensor:
    """How often each token of one fused row is drawn, along positions of one seed or across seeds; float64 [width]."""
    counts = torch.zeros(row.width, dtype=torch.float64)
    batch = RowBatch.of(sources, [row])
    batch = replace(
        batch,
        **{
            name: getattr(batch, name).expand(CHUNK, *getattr(batch, name).shape[1:])
            for name in ("base", "widths", "positive", "negative", "weights")
        },
    )
    plain = PickControls.greedy(CHUNK)
    settings = {
        name: torch.full_like(getattr(plain, name), value)
        for name, value in {"temperature": 1.0, **filters}.items()
    }
    same = torch.full((CHUNK,), 12345)
    for start in range(0, draws, CHUNK):
        index = torch.arange(start, start + CHUNK)
        seeds, positions = (same, index) if kind == "positions" else (index, same)
        got = backend.pick(batch, replace(plain, **settings, seeds=seeds, positions=positions))
        assert got.valid.all()
        counts += torch.bincount(got.tokens.cpu(), minlength=row.width)
    return counts


@pytest.mark.parametrize("kind", ["positions", "seeds"])
def test_draws_follow_the_law(torch_backend: Backend, kind: str) -> None:
    """50,000 draws of one law with 600 tokens over three blocks."""
    scores = 2 * torch.randn(600, generator=torch.Generator().manual_seed(5))
    counts = tally(torch_backend, Row(Ref(0, 0), 600), [source(scores.tolist())], 50_000, kind)
    assert abs(chi_square(counts, torch.softmax(scores.double(), dim=0))) < 5
    assert chi_square(counts, torch.softmax(scores.double() * 1.15, dim=0)) > 5, "the test can fail"


def test_fused_and_filtered_draws_follow_the_processed_law(torch_backend: Backend) -> None:
    generator = torch.Generator().manual_seed(6)
    held = source(*(torch.randn(3, 300, generator=generator) * 1.5).tolist())
    row = Row(Ref(0, 0), 300, (Term(Ref(0, 1), Ref(0, 2), 0.8),))
    filters = {"temperature": 0.8, "top_k": 150, "top_p": 0.9, "min_p": 1e-3}
    counts = tally(torch_backend, row, [held], 30_000, "positions", **filters)
    asked = replace(
        PickControls.greedy(1),
        temperature=floats([0.8]),
        top_k=torch.tensor([150]),
        top_p=floats([0.9]),
        min_p=floats([1e-3]),
    )
    law = slow.processed_law(RowBatch.of([held], [row]), asked, 0).exp()
    assert counts[law == 0].sum() == 0
    assert abs(chi_square(counts, law)) < 5
    unfiltered = slow.processed_law(RowBatch.of([held], [row]), replace(asked, top_p=floats([1.0])), 0).exp()
    assert chi_square(counts, unfiltered) > 5, "the test can fail"


def test_rare_tokens_are_drawn_as_often_as_they_should(torch_backend: Backend) -> None:
    """A token 8 nats below another: about 1 in 3000; a uniform with too few bits would miss it."""
    scores = [-math.inf] * 256
    scores[3], scores[200] = 0.0, -8.0
    draws = 60_000
    found = float(tally(torch_backend, Row(Ref(0, 0), 256), [source(scores)], draws, "seeds")[200])
    expected = draws * math.exp(-8.0) / (1 + math.exp(-8.0))
    assert abs(found - expected) < 4 * math.sqrt(expected)


def test_a_rare_block_is_drawn_as_often_as_it_should(torch_backend: Backend) -> None:
    """The same with the two tokens in different blocks."""
    scores = [-math.inf] * 600
    scores[3], scores[520] = 0.0, -8.0
    draws = 60_000
    found = float(tally(torch_backend, Row(Ref(0, 0), 600), [source(scores)], draws, "positions")[520])
    expected = draws * math.exp(-8.0) / (1 + math.exp(-8.0))
    assert abs(found - expected) < 4 * math.sqrt(expected)
