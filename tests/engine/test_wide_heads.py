"""Heads whose logits stay in float32: what they gain, and what a GPU is asked for."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from proxyserve.engine.attention import ShapeProbe, attention_plan
from proxyserve.engine.heads import WideHead, logits_dtype, widen_head
from proxyserve.engine.runner import Runner
from proxyserve.models.family import load_family
from proxyserve.models.loading import Placement
from tests.tiny import TinyFamily

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def test_of_which_dtype_logits_are() -> None:
    assert logits_dtype(BFLOAT16, CUDA) == FLOAT32
    assert logits_dtype(BFLOAT16, CPU) == BFLOAT16
    assert (
        logits_dtype(torch.float16, CUDA) == torch.float16
    )  # as good as float32, where it does not overflow


def test_fused_laws_gain_two_digits() -> None:
    """base + tuned - untuned of three bfloat16 heads, against the same in float64: kernels that round logits to
    bfloat16 leave a KL of some thousandths."""
    torch.manual_seed(0)
    heads = [nn.Linear(64, 4000, bias=False, dtype=BFLOAT16) for _ in range(3)]
    hidden = [torch.randn(8, 64, dtype=BFLOAT16) * 12 for _ in range(3)]

    def law(logits: list[torch.Tensor]) -> torch.Tensor:
        base, tuned, untuned = (tensor.double() for tensor in logits)
        return (base + tuned - untuned).log_softmax(-1)

    with torch.inference_mode():
        pairs = list(zip(heads, hidden, strict=True))
        exact = law([rows.double() @ head.weight.double().t() for head, rows in pairs])
        rounded = law([head(rows) for head, rows in pairs])
        wide = law([WideHead(head)(rows) for head, rows in pairs])

    def divergence(law: torch.Tensor) -> float:
        return (exact.exp() * (exact - law)).sum(-1).mean().item()

    assert divergence(rounded) > 1e-4
    assert divergence(wide) < 1e-8


@pytest.mark.parametrize("bias", [False, True])
def test_a_gpu_is_asked_for_float32(bias: bool) -> None:
    """Shapes, dtypes and arguments as torch checks them; there is no device to compute it."""
    with FakeTensorMode():
        empty = partial(torch.empty, dtype=BFLOAT16, device=CUDA)
        linear = SimpleNamespace(
            in_features=64, out_features=100, weight=empty(100, 64), bias=empty(100) if bias else None
        )
        logits = WideHead(linear)(empty(1, 7, 64))  # type: ignore[arg-type]
    assert logits.shape == (1, 7, 100)
    assert logits.dtype == FLOAT32


def test_a_widened_model_serves(tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are shared with what they were tied to, and the model's own layers stay as they are."""
    monkeypatch.setattr("proxyserve.engine.runner.logits_dtype", lambda dtype, device: FLOAT32)
    base = load_family(tiny_family.base, placement=Placement(CPU, BFLOAT16)).base
    weight = base.module.get_output_embeddings().weight  # type: ignore[union-attr]
    runner = Runner(base)  # type: ignore[arg-type]
    head = runner.model.module.get_output_embeddings()
    assert isinstance(head, WideHead)
    assert head.weight is weight
    assert runner.head_is_linear
    with torch.inference_mode(), attention_plan(ShapeProbe()):
        logits = runner._forward([5, 9], [0, 1], [0, 1], 2)
    assert logits.dtype == FLOAT32


def test_heads_that_are_not_plain_stay() -> None:
    class Model:
        head: nn.Module = nn.Identity()

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Model()
    widen_head(model)  # type: ignore[arg-type]
    assert isinstance(model.head, nn.Identity)
