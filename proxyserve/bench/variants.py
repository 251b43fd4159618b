"""More models of one shape, and adapters over one: any number, other weights each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_WEIGHTS = "model.safetensors"
_SPREAD = 0.1


def write_variant(folder: Path, target: Path, seed: int) -> Path:
    """The model in `folder` with each weight changed by about a tenth of its size, in the folder `target`."""
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(folder, target)
    changed = {
        name: tensor * (1.0 + _SPREAD * torch.randn(tensor.shape, generator=generator))
        for name, tensor in load_file(folder / _WEIGHTS).items()
    }
    save_file(changed, target / _WEIGHTS, {"format": "pt"})
    return target


def write_adapter(folder: Path, target: Path, seed: int, *, rank: int = 8) -> Path:
    """A random LoRA adapter, as PEFT writes it, on all linear layers of the model in `folder` but its head."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    modules = set()
    for name, weight in load_file(folder / _WEIGHTS).items():
        module = name.removesuffix(".weight")
        if ".layers." not in name or weight.dim() != 2:
            continue
        width_out, width_in = weight.shape
        down = torch.randn(rank, width_in, generator=generator) / width_in**0.5
        up = torch.randn(width_out, rank, generator=generator) * weight.std() * _SPREAD
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        modules.add(module.rpartition(".")[2])
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(modules)}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target
