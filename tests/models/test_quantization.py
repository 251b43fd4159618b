"""A base whose linear layers are stored in fewer bits, beside the same base as it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.runner import Runner
from proxyserve.engine.verify import verify_paged
from proxyserve.errors import LoadError
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.loading import Placement, load_model
from proxyserve.models.quantization import Int8Linear, check_quantization
from proxyserve.types import ModelKey
from tests.engine.driver import run, submission
from tests.tiny import TinyFamily

CPU = torch.device("cpu")


def quantized_base(family: TinyFamily, dtype: torch.dtype) -> LoadedModel:
    pytest.importorskip("torchao")
    base = load_family(family.base, placement=Placement(CPU, dtype), quantize="int8").base
    assert isinstance(base, LoadedModel)
    return base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_smaller_and_logits_nearly_the_same(tiny_family: TinyFamily, dtype: torch.dtype) -> None:
    base = quantized_base(tiny_family, dtype)
    plain = load_model(tiny_family.base, ModelKey("plain"), Placement(CPU, dtype))
    layers = [layer for layer in plain.module.modules() if isinstance(layer, nn.Linear)]
    head = plain.module.get_output_embeddings()
    stored = [layer for layer in base.module.modules() if isinstance(layer, Int8Linear)]
    assert len(stored) == len(layers) - 1
    assert type(base.module.get_output_embeddings()) is nn.Linear
    in_bits = sum(layer.weight.numel() for layer in layers if layer is not head)
    scales = sum(layer.out_features for layer in layers if layer is not head)
    assert base.bytes == plain.bytes - in_bits * dtype.itemsize + in_bits + 2 * scales
    assert base.quantized is not None and 0 < base.quantized.error < 0.1
    ids = torch.arange(1, 90)[None] % plain.vocabulary.size  # more rows than the kernel for few has
    for rows in (ids[:, :5], ids):
        expected, got = (
            plain.module(input_ids=rows).logits.float(),
            base.module(input_ids=rows).logits.float(),
        )
        assert (expected - got).square().mean().sqrt() < 0.1 * expected.std()


def test_a_layer_gives_the_same_for_few_rows_and_for_many(tiny_family: TinyFamily) -> None:
    base = quantized_base(tiny_family, torch.float32)
    layer = next(layer for layer in base.module.modules() if isinstance(layer, Int8Linear))
    inputs = torch.randn(1, 100, layer.in_features).bfloat16().float()
    whole = layer(inputs)
    assert torch.allclose(whole[:, :7], layer(inputs[:, :7]), rtol=0.03, atol=0.03)


def test_it_is_served(tiny_family: TinyFamily) -> None:
    """In paged mode as out of it, and with experts, which stay as they are."""
    pytest.importorskip("torchao")
    experts = [ExpertSource("qa", tiny_family.experts["qa"], tiny_family.untuned)]
    models = load_family(tiny_family.base, experts, placement=Placement(CPU, torch.float32), quantize="int8")
    assert isinstance(models.base, LoadedModel)
    runner = Runner(models.base)
    verify_paged(runner)
    assert runner.bytes == models.base.bytes
    expert = models.experts["qa"].tuned
    assert isinstance(expert, LoadedModel) and expert.quantized is None
    engine = Engine(models, EngineConfig(kv_memory=2**21, max_batch=8), runners=[runner])
    answers = run(engine, [submission("r", (3, 4, 5), {"qa": 1.0}, max_tokens=6)])
    assert len(answers["r/0"].tokens) == 6


def test_what_cannot_be_done_is_refused_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="--quantize int4 needs a GPU"):
        check_quantization("int4", CPU, torch.bfloat16)
    with pytest.raises(LoadError, match="--dtype bfloat16, not float16"):
        check_quantization("int4", torch.device("cuda"), torch.float16)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(LoadError, match=r"pip install 'proxyserve\[quantize\]'"):
        check_quantization("int8", CPU, torch.float32)
    # Before anything is opened, too: there is nothing here.
    with pytest.raises(LoadError, match="--quantize int4 needs a GPU"):
        load_family(Path("/nowhere/base"), placement=Placement(CPU, torch.bfloat16), quantize="int4")
