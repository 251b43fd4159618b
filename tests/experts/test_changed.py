"""Merges of adapters with other formats, against a plain loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from proxyserve.experts.changed import changed_bytes, changed_state
from proxyserve.experts.recipe import Ingredient, make_recipe
from proxyserve.experts.roots import Roots
from proxyserve.experts.source import ExpertSpec, Source
from proxyserve.models.formats.lora import merge_lora, read_lora
from tests.models.test_lora import FAMILIES, write_adapter
from tests.tiny import build_family


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_and_folders_are_merged(architecture: str, tmp_path: Path) -> None:
    family = build_family(tmp_path / "family", architecture)
    trunk = AutoModelForCausalLM.from_pretrained(family.untuned)
    adapter = write_adapter(
        tmp_path / "adapter",
        trunk,
        FAMILIES[architecture],
        **({"fan_in_fan_out": True} if architecture == "gpt2" else {}),
    )
    spec = ExpertSpec(
        Source(
            merge=(
                (0.5, Source(path=str(adapter), scale=2.0)),
                (-0.25, Source(path=str(adapter))),
                (0.5, Source(path=str(family.experts["qa"]))),
            ),
            of="small",
        )
    )
    recipe = make_recipe(spec, Roots([tmp_path]))
    assert [part.kind for _, part in recipe.tuned.parts] == ["lora", "lora", "folder"]
    state = changed_state(recipe.tuned, family.untuned, trunk, torch.float32, lambda _: None)
    untuned = {
        name: value.double() for name, value in load_file(family.untuned / "model.safetensors").items()
    }
    tuned = load_file(family.experts["qa"] / "model.safetensors")
    weights = read_lora(adapter, trunk, dtype=torch.float32, device=torch.device("cpu"))
    adapted = merge_lora(untuned, weights)
    assert set(state) == set(untuned)
    for name, value in untuned.items():
        expected = value + 0.75 * (adapted[name].double() - value) + 0.5 * (tuned[name].double() - value)
        assert torch.allclose(state[name].double(), expected, atol=1e-5), name
    assert changed_bytes(recipe.tuned, family.untuned, 4) == sum(
        value.numel() * 4 for value in state.values()
    )


def test_an_ingredient_of_one_kind_is_a_change_or_a_model() -> None:
    source = Source(path="/x")
    assert Ingredient(source, "lora").is_change and not Ingredient(source, "folder").is_change
