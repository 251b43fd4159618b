"""Packed linear layers beside plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from proxyserve.engine.cpu_linear import PackedLinear, doubled_bytes, pack_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not here")


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    tiny, small, large = nn.Linear(64, 64), nn.Linear(512, 384), nn.Linear(512, 1024, bias=False)
    return nn.Sequential(tiny, small, large).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_packed_layers_are_the_plain_ones(rows: int) -> None:
    plain = layers()
    packed = copy.deepcopy(plain)
    pack_linears(packed)
    for one, other in zip(plain, packed, strict=True):
        inputs = torch.randn(1, rows, one.in_features)
        assert torch.allclose(one(inputs), other(inputs), atol=1e-5)


def test_only_layers_that_are_faster_with_few_rows_keep_both_layouts() -> None:
    packed = layers()
    assert pack_linears(packed) == 2
    assert [isinstance(layer, PackedLinear) for layer in packed] == [False, True, True]
    assert doubled_bytes(packed) == 512 * 384 * 4


def test_bfloat16_is_packed_once_and_bit_for_bit() -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 instructions")
    plain = layers(torch.bfloat16)
    packed = copy.deepcopy(plain)
    assert pack_linears(packed) == 3
    assert doubled_bytes(packed) == 0
    inputs = torch.randn(1, 8, 512, dtype=torch.bfloat16)
    assert torch.equal(plain[1](inputs), packed[1](inputs))
