"""On a CPU rows are picked a few at a time; the slow twin is all of them together."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyserve_kernels.torch_backend.blocks import best_of
from proxyserve_kernels.torch_backend.parts import in_parts, joined
from proxyserve_kernels.torch_backend.pick import pick_at_once
from tests.kernels.strategies import batches, picks
from tests.kernels.test_invariance import assert_same_bits, assert_same_picks


@settings(max_examples=40)
@given(st.data(), st.integers(1, 3))
def test_parts_are_the_whole(data: st.DataObject, size: int) -> None:
    batch = data.draw(batches((7, 300, 600), most_rows=6))
    asked = data.draw(picks(batch))
    whole = pick_at_once(batch, asked)
    parts = joined([pick_at_once(*part) for part in in_parts(batch, asked, size)])
    for row in range(batch.size):
        assert_same_picks(whole, row, parts, row, asked)
    assert (whole.raw is None) == (parts.raw is None)
    assert (whole.processed is None) == (parts.processed is None)
    assert (whole.removed is None) == (parts.removed is None)
    if whole.removed is not None and parts.removed is not None:
        assert_same_bits(whole.removed, parts.removed)
    for mine, others in ((whole.raw, parts.raw), (whole.processed, parts.processed)):
        if mine is not None and others is not None:
            assert mine.ids.shape == others.ids.shape
            assert mine.values.shape == others.values.shape


def test_the_best_token_is_the_first_of_the_largest() -> None:
    scores = torch.full((5, 512), -1.0)
    scores[0, 300] = scores[0, 301] = 2.0
    scores[1, [10, 400]] = 3.0
    scores[2] = -math.inf
    scores[3, 500] = math.nan
    scores[4, 7] = math.inf
    peaks, ids = best_of(scores)
    expected = scores.max(dim=1)
    assert_same_bits(peaks, expected.values)
    assert_same_bits(ids, expected.indices)
