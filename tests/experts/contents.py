"""What experts can be: one tiny model's worth of each format, each with a whole folder of the same weights, and sources
that must never be served."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.models.formats.compressed import compress, decompress
from proxyserve.models.formats.diff import make_diff
from tests.tiny import TinyFamily, build_family, make_tokenizer, save_model


@dataclass(frozen=True)
class Content:
    """What an expert can be: a spec, and a whole folder with the same weights for the reference."""

    name: str
    spec: ExpertSpec
    folder: Path


@dataclass(frozen=True)
class World:
    """Tiny models under one `root`, from which experts may be loaded. The `contents` are of all formats; `broken` maps
    what is wrong with it to a source that must never be served; `changing` is a folder that may be touched."""

    root: Path
    family: TinyFamily
    contents: Mapping[str, Content]
    broken: Mapping[str, ExpertSpec]
    changing: Path

    @property
    def untuned(self) -> Source:
        return Source(path=str(self.family.untuned))

    def spec(self, path: Path, **fields: Any) -> ExpertSpec:
        return ExpertSpec(Source(path=str(path)), self.untuned, **fields)


def build_world(root: Path) -> World:
    family = build_family(root, "llama")
    untuned = Source(path=str(family.untuned))
    first, second = family.experts["qa"], family.experts["record"]

    def spec(path: Path, **source: Any) -> ExpertSpec:
        return ExpertSpec(Source(path=str(path), **source), untuned)

    third = _noisy(family.untuned, root / "third", seed=11)
    make_diff(third, family.untuned, root / "diff")
    fourth = _noisy(family.untuned, root / "fourth", seed=12)
    compress(fourth, family.untuned, root / "compressed", density=0.3)
    decompress(root / "compressed", root / "decompressed")
    merge = Source(merge=((0.7, Source(path=str(first))), (0.5, Source(path=str(second)))))
    contents = [
        Content("first", spec(first), first),
        Content("second", spec(second), second),
        Content("lora", spec(_adapter(root / "lora", family.untuned)), _with_adapter(root, family.untuned)),
        Content("diff", spec(root / "diff"), third),
        Content(
            "compressed",
            spec(root / "compressed"),
            _sum(root / "decompressed-full", family.untuned, {"diff": 1.0}, root / "decompressed"),
        ),
        Content(
            "merge",
            ExpertSpec(merge, untuned),
            _sum(root / "merged", family.untuned, {"first": 0.7, "second": 0.5}, first, second),
        ),
    ]
    broken = {
        "damaged": spec(_damaged(root / "damaged", first)),
        "other tokenizer": spec(
            save_model(root / "other", "llama", make_tokenizer(300, extra=("<a>", "<b>")), seed=8, padding=8)
        ),
        "NaN": spec(_with_nan(root / "nan", first)),
        "adapter for another model": spec(_adapter(root / "lora-wide", family.base)),
    }
    changing = root / "changing"
    _noisy(family.untuned, changing, seed=13)
    return World(root, family, {content.name: content for content in contents}, broken, changing)


def _noisy(untuned: Path, folder: Path, *, seed: int) -> Path:
    """Another tuned model."""
    shutil.copytree(untuned, folder)
    generator = torch.Generator().manual_seed(seed)
    state = load_file(folder / "model.safetensors")
    for name in sorted(state):
        state[name] = state[name] + 0.1 * torch.randn(state[name].shape, generator=generator)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


_CHANGED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
_RANK, _ALPHA = 4, 8


def _adapter(folder: Path, trunk: Path) -> Path:
    """A PEFT adapter for this model, strong enough to be told from none."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(14)
    tensors = {}
    for name, weight in sorted(load_file(trunk / "model.safetensors").items()):
        if any(f"{module}.weight" in name for module in _CHANGED):
            size_out, size_in = weight.shape
            place = f"base_model.model.{name.removesuffix('.weight')}"
            for side, shape in (("A", (_RANK, size_in)), ("B", (size_out, _RANK))):
                tensors[f"{place}.lora_{side}.weight"] = 0.2 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _with_adapter(root: Path, untuned: Path) -> Path:
    """The untuned model with root/lora merged into it."""
    pairs = load_file(root / "lora" / "adapter_model.safetensors")
    state = load_file(untuned / "model.safetensors")
    for key in [key for key in pairs if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix("lora_A.weight") + "weight"
        state[name] = state[name] + _ALPHA / _RANK * pairs[key.replace("lora_A", "lora_B")] @ pairs[key]
    return _folder_like(untuned, root / "lora-full", state)


def _sum(folder: Path, untuned: Path, weights: Mapping[str, float], *parts: Path) -> Path:
    """untuned + sum of weight * change; a part is a diff if it is called so, else a whole model."""
    ours = load_file(untuned / "model.safetensors")
    state = {name: value.double() for name, value in ours.items()}
    for (kind, weight), part in zip(weights.items(), parts, strict=True):
        file = part / ("diff.safetensors" if kind == "diff" else "model.safetensors")
        for name, value in load_file(file).items():
            state[name] += weight * (value.double() - (0.0 if kind == "diff" else ours[name].double()))
    return _folder_like(untuned, folder, {name: value.float() for name, value in state.items()})


def _folder_like(other: Path, folder: Path, state: Mapping[str, Tensor]) -> Path:
    shutil.copytree(other, folder)
    tensors = {name: value.contiguous() for name, value in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _damaged(folder: Path, other: Path) -> Path:
    """The header is whole, the last weights are not."""
    shutil.copytree(other, folder)
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    return folder


def _with_nan(folder: Path, other: Path) -> Path:
    state = load_file(other / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    return _folder_like(other, folder, state)
