"""Folders that cannot be served are refused, and the message says what is wrong with them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StableLmConfig,
)

from proxyserve.engine.engine import Engine
from proxyserve.errors import LoadError
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import Placement, choose_placement, load_model
from proxyserve.types import ModelKey
from tests.tiny import TinyFamily, make_tokenizer, save_model

CPU = Placement(torch.device("cpu"), torch.float32)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lost_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lost_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def longrope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (truncate, "incomplete or damaged"),
        (pickled, r"no \.safetensors file"),
        (lost_shard, "2 of 2 weight files are missing"),
        (lost_weights, "weights are missing from the files"),
        (broken_config, r"config\.json cannot be used"),
        (no_config, r"no config\.json"),
        (no_tokenizer, "tokenizer"),
        (longrope, "rope type 'dynamic'"),
    ],
)
def test_damaged_folders(
    tiny_family: TinyFamily, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_family.base, folder)
    load_model(folder, ModelKey("m"), CPU)
    damage(folder)
    with pytest.raises(LoadError, match=message) as refusal:
        load_model(folder, ModelKey("m"), CPU)
    assert str(folder) in str(refusal.value)


SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4),
        FalconConfig(**SMALL, max_position_embeddings=64),
        GPTNeoConfig(
            vocab_size=400,
            hidden_size=32,
            num_layers=2,
            attention_types=[[["global"], 2]],
            num_heads=4,
            max_position_embeddings=64,
        ),
        MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
def test_classes_outside_the_attention_registry_are_refused(config: PreTrainedConfig, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"attention registry|layers of type linear_attention"):
        load_model(tmp_path, ModelKey("m"), CPU)


def test_a_class_that_passes_no_arguments_down(tmp_path: Path) -> None:
    """StableLM's layers drop keyword arguments and do not declare the registry; whatever the answer is, it must not be
    a wrong one."""
    config = StableLmConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="attention registry"):
        Engine(load_family(tmp_path))


def test_wrong_paged_logits_are_found(tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """If paging changed the logits, the check at load would say so."""
    from proxyserve.engine import attention

    original = attention.SpanGroup.mask

    def see_everything(group: attention.SpanGroup, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros_like(original(group, window, dtype))

    monkeypatch.setattr(attention.SpanGroup, "mask", see_everything)
    with pytest.raises(LoadError, match="other logits in paged mode"):
        Engine(load_family(tiny_family.base))


def test_shared_folders_are_loaded_once(tiny_family: TinyFamily) -> None:
    models = load_family(
        tiny_family.base,
        [ExpertSource(name, tuned, tiny_family.untuned) for name, tuned in tiny_family.experts.items()],
    )
    assert [key.name for key in models.models] == ["atlas", "qa.tuned", "small", "record.tuned"]
    assert models.expert("qa").untuned is models.expert("record").untuned


@pytest.mark.parametrize("name", ["", "a+b", "a.b", "a:b", "base", "atlas", "x" * 65])
def test_names_that_would_be_ambiguous(tiny_family: TinyFamily, name: str) -> None:
    with pytest.raises(LoadError):
        load_family(tiny_family.base, [ExpertSource(name, tiny_family.untuned, tiny_family.untuned)])


def test_cuda_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(LoadError, match="no CUDA device"):
        choose_placement("cuda")
    assert choose_placement() == CPU


def test_context_length_is_needed(tiny_family: TinyFamily, tmp_path: Path) -> None:
    assert load_model(tiny_family.base, ModelKey("m"), CPU).context_length == 256
    assert isinstance(load_model(tiny_family.base, ModelKey("m"), CPU).module.config, LlamaConfig)


def test_threads_that_load_at_once_leave_transformers_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it makes a model it patches what all threads see, and puts back what it found. A patch that stays would
    untie every model that is made afterwards."""
    folder = save_model(tmp_path / "tied", "gpt2", make_tokenizer(), seed=1)
    before = PreTrainedModel.tie_weights, torch.linspace
    # What is left behind must not outlive this test.
    monkeypatch.setattr(PreTrainedModel, "tie_weights", PreTrainedModel.tie_weights)
    monkeypatch.setattr(torch, "linspace", torch.linspace)

    def load(_: int) -> None:
        module = load_model(folder, ModelKey("tied"), CPU).module
        assert module.get_output_embeddings().weight is module.get_input_embeddings().weight

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert len(list(threads.map(load, range(16)))) == 16
    finally:
        sys.setswitchinterval(interval)
    assert (PreTrainedModel.tie_weights, torch.linspace) == before
