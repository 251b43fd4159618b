"""Loading beside running steps: nothing that other threads share is changed; files may be overwritten afterwards."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from proxyserve.models.loading import Placement, load_model
from proxyserve.types import ModelKey
from tests.tiny import TinyFamily

IDS = torch.tensor([[5, 17, 200, 33, 9]])


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = module(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overwritten_files_do_not_change_a_loaded_model(
    tiny_family: TinyFamily, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny_family.experts["qa"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = load_model(folder, ModelKey("qa"), Placement(torch.device("cpu"), dtype), beside_steps=True)
    before = logits(model.module)
    with (folder / "model.safetensors").open("r+b") as weights:
        size = weights.seek(0, 2)
        weights.seek(size // 2)
        weights.write(b"\x01" * (size - size // 2))
    assert torch.equal(logits(model.module), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_a_plain_load(tiny_family: TinyFamily, dtype: torch.dtype) -> None:
    folder = tiny_family.experts["qa"]
    model = load_model(folder, ModelKey("qa"), Placement(torch.device("cpu"), dtype), beside_steps=True)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    assert model.dtype == dtype and model.module.config.dtype == dtype
    buffers = {name: buffer.dtype for name, buffer in plain.named_buffers()}
    assert {name: buffer.dtype for name, buffer in model.module.named_buffers()} == buffers
    assert torch.equal(logits(model.module), logits(plain))


def test_the_default_dtype_stays_while_bfloat16_is_loaded(tiny_family: TinyFamily) -> None:
    seen: set[torch.dtype] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.add(torch.get_default_dtype())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(5):
            place = Placement(torch.device("cpu"), torch.bfloat16)
            load_model(tiny_family.experts["qa"], ModelKey("qa"), place, beside_steps=True)
    finally:
        done.set()
        watcher.join()
    assert seen == {torch.float32}
