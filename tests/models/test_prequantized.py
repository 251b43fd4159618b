"""Bases whose files are quantised already, beside plain Hugging Face forwards of the same files."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TorchAoConfig

from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.runner import Runner, probe_ids
from proxyserve.engine.settling import settle_dtype
from proxyserve.engine.verify import verify_paged
from proxyserve.errors import LoadError
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.loading import Placement
from proxyserve.models.prequantized import check_prequantized
from proxyserve.models.quantization import Int8Linear
from tests.engine.driver import run, submission
from tests.tiny import TinyFamily, config_of

CPU = Placement(torch.device("cpu"), torch.float32)
IDS = tuple(range(3, 14))

_GROUP = 32

#: From a matrix to what is stored of it, by the ends of names, and to what that stands for.
Store = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scale).round().to(torch.int8)
    return {"weight": numbers, "weight_scale": scale}, numbers * scale


def packed_int4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Eight numbers in each int32, a scale for each group of columns."""
    grouped = weight.view(weight.shape[0], -1, _GROUP)
    scale = grouped.abs().amax(2, keepdim=True) / 7
    numbers = (grouped / scale).round()
    nibbles = (numbers.long() + 8).view(weight.shape[0], -1, 8)
    packed = (nibbles << (4 * torch.arange(8))).sum(-1).to(torch.int32)
    parts = {
        "weight_packed": packed,
        "weight_scale": scale[..., 0],
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, (numbers * scale).view_as(weight)


def fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def fp8_blocks(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tiny matrices are one block each."""
    scale = weight.abs().max().reshape(1, 1) / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scale}, numbers.float() * scale


def compressed(form: str, kind: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


SPELLED_OUT: dict[str, tuple[Store, dict[str, Any]]] = {
    "compressed-tensors, int8": (int8, compressed("int-quantized", "int")),
    "compressed-tensors, fp8": (fp8, compressed("float-quantized", "float")),
    "compressed-tensors, packed int4": (
        packed_int4,
        compressed("pack-quantized", "int", num_bits=4, strategy="group", group_size=_GROUP),
    ),
    "fp8": (
        fp8_blocks,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        },
    ),
}


def with_config(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


def base_of(folder: Path, **options: Any) -> LoadedModel:
    base = load_family(folder, placement=CPU, **options).base
    assert isinstance(base, LoadedModel)
    return base


@torch.inference_mode()
def hf_logits(folder: Path, ids: Sequence[int]) -> Tensor:
    """By transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_spelled_out_while_loading(name: str, tiny_family: TinyFamily, tmp_path: Path) -> None:
    """The same model as with the rounded weights in plain files, of the same size in memory."""
    store, settings = SPELLED_OUT[name]
    if settings["quant_method"] == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    files, rounded = tmp_path / "files", tmp_path / "rounded"
    for folder in (files, rounded):
        shutil.copytree(tiny_family.base, folder)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for key, weight in load_file(tiny_family.base / "model.safetensors").items():
        tensors[key] = plain[key] = weight
        if key.endswith("proj.weight"):
            parts, plain[key] = store(weight)
            del tensors[key]
            tensors |= {key.removesuffix("weight") + end: part.contiguous() for end, part in parts.items()}
    save_file(tensors, files / "model.safetensors", {"format": "pt"})
    save_file(plain, rounded / "model.safetensors", {"format": "pt"})
    with_config(files, settings)

    base, other = base_of(files), base_of(rounded)
    assert base.quantized is None
    assert (base.bytes, base.parameters, base.vocabulary) == (other.bytes, other.parameters, other.vocabulary)
    runner = Runner(base)
    verify_paged(runner)
    assert torch.allclose(runner.reference, hf_logits(rounded, probe_ids(base)), atol=1e-4)
    assert settle_dtype("cpu", "auto", files).value.dtype == torch.float32


@pytest.fixture(scope="module")
def torchao_int8(tiny_family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `save_pretrained` writes it."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    folder = tmp_path_factory.mktemp("torchao") / "atlas"
    shutil.copytree(tiny_family.base, folder)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_family.base, dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    model.save_pretrained(folder)
    return folder


def test_kept_as_stored(torchao_int8: Path, tiny_family: TinyFamily) -> None:
    """Served with experts; the memory plan counts a byte per weight and a scale per row."""
    experts = [ExpertSource("qa", tiny_family.experts["qa"], tiny_family.untuned)]
    models = load_family(torchao_int8, experts, placement=CPU)
    base, plain = models.base, base_of(tiny_family.base)
    assert isinstance(base, LoadedModel) and base.quantized is not None
    assert (base.quantized.how, base.quantized.error) == ("torchao", None)
    assert base.parameters == plain.parameters
    layers = [layer for layer in base.module.modules() if isinstance(layer, Int8Linear)]
    numbers = sum(layer.numbers.numel() for layer in layers)
    assert base.bytes == plain.bytes - 4 * numbers + numbers + sum(2 * layer.out_features for layer in layers)
    runner = Runner(base)
    verify_paged(runner)
    # Its layers round their inputs to bfloat16, which plain torchao does not.
    expected = hf_logits(torchao_int8, probe_ids(base))
    assert (runner.reference - expected).square().mean().sqrt() < 0.06 * expected.std()
    engine = Engine(models, EngineConfig(kv_memory=2**21, max_batch=8), runners=[runner])
    assert len(run(engine, [submission("r", IDS, {"qa": 1.0}, max_tokens=6)])["r/0"].tokens) == 6
    assert runner.bytes == base.bytes


def test_what_must_not_be_quantised(
    torchao_int8: Path, tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LoadError, match=r"quantised already \(torchao\); leave out --quantize"):
        base_of(torchao_int8, quantize="int8")
    with pytest.raises(LoadError, match=r"quantised already \(torchao\), and an expert's models must not be"):
        load_family(tiny_family.base, [ExpertSource("qa", torchao_int8, tiny_family.untuned)], placement=CPU)


def test_what_cannot_be_loaded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of a GPU or of a package, or because nobody knows it."""
    config = config_of("llama", 64, hidden=32, layers=1)
    for method in ("gptq", "awq", "bitsandbytes", "mxfp4", "unheard-of"):
        config.quantization_config = {"quant_method": method}
        with pytest.raises(
            LoadError, match=rf"need a GPU \({method}\); on a CPU use one in compressed-tensors, fp8"
        ):
            check_prequantized(config, CPU.device, "here")
    gpu = torch.device("cuda")
    with pytest.raises(LoadError, match=r"quantised weights \(unheard-of\) cannot be used here"):
        check_prequantized(config, gpu, "here")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LoadError, match=r"a package for that is missing: .*pip install"):
        check_prequantized(config, gpu, "here")
