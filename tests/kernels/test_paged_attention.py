"""Attention over pages against float64, key by key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.strategies import DEVICE

pytest.importorskip("triton")

from proxyserve_kernels.triton_backend import paged

BLOCKS = 20


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    firsts: Tensor,
    positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attend_pages` one token at a time, float64."""
    rows = []
    repeats = query.shape[1] // keys.shape[2]
    for token in range(len(query)):
        length = int(positions[token]) + 1
        first = int(firsts[token])
        ids = pages[first : first + -(-length // keys.shape[1])]
        begin = 0 if window is None else max(0, length - window)
        seen = [tensor[ids].flatten(0, 1)[begin:length].double() for tensor in (keys, values)]
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in seen)
        scores = torch.einsum("hd,khd->hk", query[token].double(), key) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        extra = torch.empty(len(scores), 0) if sinks is None else sinks[:, None].cpu()
        weights = torch.cat([scores, extra.double()], dim=1).softmax(-1)[:, : scores.shape[1]]
        rows.append(torch.einsum("hk,khd->hd", weights, value))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("extras", "sinks"),
    [({}, False), ({"softcap": 1.5}, False), ({"window": 7}, True), ({"window": 1, "softcap": 2.0}, True)],
    ids=["plain", "softcap", "window and sinks", "everything"],
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "value", "block_size"),
    [(4, 2, 16, 16, 4), (6, 2, 24, 40, 16), (3, 3, 64, 64, 1)],
    ids=["grouped", "odd sizes", "blocks of one token"],
)
def test_attend_pages(
    heads: int,
    kv_heads: int,
    size: int,
    value: int,
    block_size: int,
    extras: dict[str, float],
    sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens of lanes that share blocks, the first of a lane and others; the keys shared out among programs."""
    monkeypatch.setattr(paged, "PROGRAMS", 4 * 4 * kv_heads)
    torch.manual_seed(heads)
    keys = torch.randn(BLOCKS, block_size, kv_heads, size)
    values = torch.randn(BLOCKS, block_size, kv_heads, value)
    query = torch.randn(4, heads, size)
    pages = torch.randperm(BLOCKS)
    positions = torch.tensor([0, 3 * block_size - 1, 5 * block_size, 5 * block_size + block_size // 2])
    firsts = torch.tensor([3, 0, 7, 7])
    tensors = [tensor.to(DEVICE) for tensor in (query, keys, values, pages, firsts, positions)]
    options = {"scale": 0.3, **extras, "sinks": torch.randn(heads, device=DEVICE) if sinks else None}
    assert paged.shares_for(4, kv_heads) == 4
    got = paged.attend_pages(*tensors, **options)  # type: ignore[arg-type]
    expected = reference(query, keys, values, pages, firsts, positions, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got.double().cpu(), expected, atol=2e-6, rtol=0)


def test_what_is_left_of_a_lane_in_its_last_block_is_not_seen() -> None:
    """Nor other blocks: NaN everywhere but in the lane's own keys."""
    keys, values = torch.full((4, 4, 1, 16), torch.nan), torch.full((4, 4, 1, 16), torch.nan)
    keys[2], values[2], keys[1, :2], values[1, :2] = 1.0, 2.0, 1.0, 2.0
    tensors = [torch.ones(1, 1, 16), keys, values, torch.tensor([0, 2, 1, 3]), *torch.tensor([[1], [5]])]
    got = paged.attend_pages(*(tensor.to(DEVICE) for tensor in tensors), scale=1.0)
    assert got.flatten().tolist() == pytest.approx([2.0] * 16)


def test_shares_fill_a_gpu_and_no_more() -> None:
    assert paged.shares_for(1, 8) == 32
    assert paged.shares_for(64, 8) == 1
    assert paged.shares_for(8, 8) == 8


def test_strided_tensors_are_refused() -> None:
    pages = torch.zeros(1, dtype=torch.int64)
    keys = torch.zeros(2, 4, 1, 16)
    with pytest.raises(ValueError, match="contiguous"):
        paged.attend_pages(torch.zeros(1, 16, 2).mT, keys, keys, pages, pages, pages, scale=1.0)
