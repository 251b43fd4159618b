"""Small pieces of the Triton kernels by themselves, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from proxyserve_kernels import philox
from proxyserve_kernels.rows import Ref, Row, RowBatch, Term
from proxyserve_kernels.triton_backend import launch
from proxyserve_kernels.triton_backend.device import layout, noise, sorting, tiles
from proxyserve_kernels.triton_backend.table import build_table
from proxyserve_kernels.triton_backend.tuning import TILES
from tests.kernels.strategies import DEVICE


@triton.jit
def _noise(seeds, positions, firsts, out, COUNT: tl.constexpr):  # noqa: N803
    row = tl.program_id(0)
    drawn = noise.gumbel(
        tl.load(seeds + row), tl.load(positions + row).to(tl.int32), 1, tl.load(firsts + row), COUNT
    )
    tl.store(out + row * COUNT + tl.arange(0, COUNT), drawn)


@triton.jit
def _sort(keys, out, COUNT: tl.constexpr):  # noqa: N803
    place = tl.arange(0, COUNT)
    tl.store(out + place, sorting.sort_descending(tl.load(keys + place)))


@triton.jit
def _pack(scores, keys, back, COUNT: tl.constexpr):  # noqa: N803
    place = tl.arange(0, COUNT)
    packed = tiles.packed(tl.load(scores + place), place)
    tl.store(keys + place, packed)
    tl.store(back + place, tiles.packed_score(packed))
    tl.store(back + COUNT + place, tiles.packed_index(packed).to(tl.float32))


def test_noise_is_that_of_torch_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    seeds = torch.randint(-(2**63), 2**63 - 1, (60,), generator=generator).to(DEVICE)
    positions = torch.randint(0, 2**31, (60,), generator=generator).to(DEVICE)
    firsts = 256 * torch.randint(0, 1000, (60,), generator=generator).to(DEVICE)
    out = torch.empty(60, 256, device=DEVICE)
    _noise[(60,)](seeds, positions, firsts.int(), out, 256)
    assert torch.equal(out, philox.gumbel(seeds, positions, 1, firsts, 256))


@pytest.mark.parametrize("count", [8, 256])
def test_the_sorting_network(count: int) -> None:
    keys = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(count))
    keys[3] = keys[5]
    keys[1], keys[7] = -(2**63), 2**63 - 1
    out = torch.empty_like(keys, device=DEVICE)
    _sort[(1,)](keys.to(DEVICE), out, count)
    assert torch.equal(out.cpu(), keys.sort(descending=True).values)


def test_keys_order_scores_then_ids() -> None:
    inf = float("inf")
    scores = torch.tensor(
        [0.0, -0.0, 1.5, -1.5, inf, -inf, 1e-40, -1e-40, 3e38, -3e38, 1.5, 0.0, 2.0, -2.0, 7.0, 7.0]
    )
    keys = torch.empty(16, dtype=torch.int64, device=DEVICE)
    back = torch.empty(32, device=DEVICE)
    _pack[(1,)](scores.to(DEVICE), keys, back, 16)
    order = keys.cpu().argsort(descending=True)
    expected = sorted(range(16), key=lambda index: (-scores[index].item(), index))
    assert order.tolist() == expected
    assert torch.equal(back[:16].cpu(), scores) and torch.equal(back[16:].cpu(), torch.arange(16.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile_gives_the_same_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    source = (4 * torch.randn(4, 2100, generator=generator)).to(dtype).to(DEVICE)
    rows = [
        Row(Ref(0, 0), 2099, (Term(Ref(0, 1), Ref(0, 2), 0.7),)),
        Row(Ref(0, 3), 256),
        Row(Ref(0, 2), 1),
    ]
    table = build_table(RowBatch.of([source], rows))
    wishes = launch.Wishes(scales=True)
    found = []
    for tile in TILES:
        stats = torch.full((layout.PLANES, table.bucket, table.blocks), -7.0, device=DEVICE)
        launch.launch_stats(table, stats, wishes, tile)
        found.append(stats[: layout.KEPT_MAX.value])
    assert all(torch.equal(stats, found[0]) for stats in found[1:])
    assert (found[0][layout.RAW_SUM.value, :3] != -7.0).all(), "every block of every row is written"
