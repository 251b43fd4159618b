"""Reading PEFT adapters: what is read is what a plain computation from the file's tensors gives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from proxyserve.engine.cpu_linear import pack_linears
from proxyserve.errors import LoadError
from proxyserve.models.formats.lora import LoraWeights, merge_lora, read_lora
from tests.tiny import config_of

FAMILIES = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
    "qwen3": ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"),
    "gemma2": ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj"),
    # GPT-2's layers are stored transposed, one of them (c_proj of the attention) square.
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_proj"),
}


def make_trunk(architecture: str = "llama", *, hidden: int = 32) -> PreTrainedModel:
    torch.manual_seed(7)
    config = config_of(architecture, 64, hidden=hidden, layers=2)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out)"""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.weight.shape[0], module.weight.shape[1]  # Conv1D


def write_adapter(
    folder: Path,
    trunk: nn.Module,
    modules: tuple[str, ...] = FAMILIES["llama"],
    *,
    ranks: Mapping[str, int] | None = None,
    tensors: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    **config: Any,
) -> Path:
    """An adapter in PEFT's layout, with random weights; `tensors` may change what is written."""
    folder.mkdir(parents=True, exist_ok=True)
    value = {
        "peft_type": "LORA",
        "base_model_name_or_path": "/somewhere/else",
        "r": 4,
        "lora_alpha": 6,
        "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in modules],
        "modules_to_save": None,
        "use_dora": False,
        "init_lora_weights": True,
        "lora_dropout": 0.1,
        "rank_pattern": {},
    } | config
    (folder / "adapter_config.json").write_text(json.dumps(value))
    generator = torch.Generator().manual_seed(len(str(folder)))
    stored: dict[str, Tensor] = {}
    for name in modules:
        size_in, size_out = sizes(trunk.get_submodule(name))
        rank = (ranks or {}).get(name, value["r"])
        stored[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, size_in, generator=generator)
        stored[f"base_model.model.{name}.lora_B.weight"] = torch.randn(size_out, rank, generator=generator)
    tensors(stored)
    save_file(stored, folder / "adapter_model.safetensors")
    return folder


def read(folder: Path, trunk: nn.Module, *, scale: float = 1.0) -> LoraWeights:
    return read_lora(folder, trunk, dtype=torch.float32, device=torch.device("cpu"), scale=scale)


def changes_by_hand(folder: Path, scalings: Mapping[str, float]) -> dict[str, Tensor]:
    """scaling * B A [out, in] of each module, in float64 from the file."""
    stored = load_file(folder / "adapter_model.safetensors")
    return {
        name: scaling
        * stored[f"base_model.model.{name}.lora_B.weight"].double()
        @ stored[f"base_model.model.{name}.lora_A.weight"].double()
        for name, scaling in scalings.items()
    }


# What is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_adapter_is_the_product_of_its_matrices(architecture: str, tmp_path: Path) -> None:
    trunk = make_trunk(architecture)
    modules = FAMILIES[architecture]
    weights = read(write_adapter(tmp_path, trunk, modules), trunk)
    state = trunk.state_dict()
    merged = merge_lora(state, weights)
    assert weights.rank == 4
    assert list(weights.modules) == sorted(modules)
    assert weights.bytes == sum(4 * 4 * sum(sizes(trunk.get_submodule(name))) for name in modules)
    by_hand = changes_by_hand(tmp_path, dict.fromkeys(modules, 6 / 4))
    for name, weight in state.items():
        change = by_hand.get(name.removesuffix(".weight"))
        if change is None:
            assert torch.equal(merged[name], weight)
        else:
            expected = weight.double() + (change.T if architecture == "gpt2" else change)
            torch.testing.assert_close(merged[name].double(), expected, atol=1e-5, rtol=1e-5)


Q, DOWN = FAMILIES["llama"]


@pytest.mark.parametrize(
    ("config", "ranks", "scale", "scalings"),
    [
        ({}, {}, 1.0, (6 / 4, 6 / 4)),
        ({}, {}, -0.5, (-3 / 4, -3 / 4)),
        ({"lora_alpha": 2.5}, {}, 1.0, (2.5 / 4, 2.5 / 4)),
        ({"use_rslora": True}, {}, 1.0, (6 / 2, 6 / 2)),
        ({"rank_pattern": {"down_proj": 9}}, {DOWN: 9}, 1.0, (6 / 4, 6 / 9)),
        ({"rank_pattern": {"down_proj": 9}, "use_rslora": True}, {DOWN: 9}, 1.0, (6 / 2, 6 / 3)),
        ({"alpha_pattern": {"mlp.down_proj": 1}}, {}, 1.0, (6 / 4, 1 / 4)),
        ({"alpha_pattern": {"own_proj": 1}}, {}, 1.0, (6 / 4, 6 / 4)),  # not from a dot on
        ({"alpha_pattern": {"down": 1}}, {}, 1.0, (6 / 4, 6 / 4)),  # not to the end
        ({"alpha_pattern": {r".*\.0\..*": 1, "q_proj": 2}}, {}, 1.0, (1 / 4, 6 / 4)),  # the first that fits
        ({"alpha_pattern": {f"^{Q}": 3}}, {}, 2.0, (6 / 4, 12 / 4)),
        (
            {"alpha_pattern": {r"layers\.\d+\.(mlp|self_attn)\.(q|down)_proj": 8}, "rank_pattern": {DOWN: 2}},
            {DOWN: 2},
            1.0,
            (8 / 4, 8 / 2),
        ),
    ],
)
def test_scaling(
    config: dict[str, Any],
    ranks: dict[str, int],
    scale: float,
    scalings: tuple[float, float],
    tmp_path: Path,
) -> None:
    trunk = make_trunk()
    weights = read(write_adapter(tmp_path, trunk, ranks=ranks, **config), trunk, scale=scale)
    assert weights.rank == max([4, *ranks.values()])
    for name, change in changes_by_hand(tmp_path, dict(zip((Q, DOWN), scalings, strict=True))).items():
        module = weights.modules[name]
        torch.testing.assert_close((module.b @ module.a).double(), change, atol=1e-5, rtol=1e-5)


def test_dtype_and_layout(tmp_path: Path) -> None:
    trunk = make_trunk()
    weights = read_lora(
        write_adapter(tmp_path, trunk), trunk, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    for module in weights.modules.values():
        assert module.a.dtype == module.b.dtype == torch.bfloat16
        assert module.a.is_contiguous()
        assert module.b.t().is_contiguous()


def test_replaced_layers_are_recognised(tmp_path: Path) -> None:
    trunk = make_trunk(hidden=1024)
    folder = write_adapter(tmp_path, trunk)
    before = read(folder, trunk)
    assert pack_linears(trunk) > 0
    assert not isinstance(trunk.get_submodule(Q), nn.Linear)
    after = read(folder, trunk)
    assert all(torch.equal(before.modules[name].a, module.a) for name, module in after.modules.items())


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(("old", "new"), [("base_model.model.", ""), (".weight", ".default.weight")])
def test_other_spellings_of_names(old: str, new: str, tmp_path: Path) -> None:
    trunk = make_trunk()
    weights = read(write_adapter(tmp_path, trunk, tensors=rename(old, new)), trunk)
    assert sorted(weights.modules) == sorted(FAMILIES["llama"])


def test_harmless_and_unset_fields(tmp_path: Path) -> None:
    trunk = make_trunk()
    config = {
        "task_type": "CAUSAL_LM",
        "peft_version": "9.9",
        "layers_to_transform": [0, 1],
        "loftq_config": {},
        "use_dora": False,
        "layer_replication": None,
        "field_of_the_future": None,
        "another": [],
        "init_lora_weights": "gaussian",
        "eva_config": {"rho": 2.0},
    }
    assert read(write_adapter(tmp_path, trunk, **config), trunk).rank == 4


# What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "LOHA", "peft_type 'LOHA'"),
        ("peft_type", None, "peft_type None"),
        ("use_dora", True, "use_dora"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("bias", "lora_only", "bias 'lora_only'"),
        ("lora_bias", True, "lora_bias"),
        ("target_parameters", ["mlp.experts.down_proj"], "target_parameters"),
        ("layer_replication", [[0, 1], [0, 2]], "layer_replication"),
        ("trainable_token_indices", [1, 2], "trainable_token_indices"),
        ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens"),
        ("use_qalora", True, "use_qalora"),
        ("use_bdlora", {"nblocks": 2}, "use_bdlora"),
        ("arrow_config", {"top_k": 1}, "arrow_config"),
        ("kasa_config", {"beta": 1}, "kasa_config"),
        ("field_of_the_future", 1, "field_of_the_future"),
        ("init_lora_weights", "pissa", "init_lora_weights 'pissa'"),
        ("init_lora_weights", "pissa_niter_16", "init_lora_weights"),
        ("init_lora_weights", "loftq", "init_lora_weights"),
        ("init_lora_weights", "olora", "init_lora_weights"),
        ("init_lora_weights", "corda", "init_lora_weights"),
        ("init_lora_weights", "lora_ga", "init_lora_weights"),
        ("r", 0, "r in adapter_config.json"),
        ("r", "8", "r in adapter_config.json"),
        ("lora_alpha", None, "lora_alpha in adapter_config.json"),
        ("lora_alpha", math.nan, "lora_alpha in adapter_config.json"),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern in adapter_config.json"),
        ("rank_pattern", ["q_proj"], "rank_pattern in adapter_config.json"),
        ("alpha_pattern", {"q_proj": "x"}, "alpha_pattern in adapter_config.json"),
        ("alpha_pattern", {"(": 1}, "no regular expression"),
        ("alpha_pattern", {"(a+)+$": 1}, "too long to match"),
        ("alpha_pattern", {".*.*.*.*.*x": 1}, "too long to match"),
    ],
)
def test_configurations_that_are_refused(field: str, value: object, message: str, tmp_path: Path) -> None:
    trunk = make_trunk()
    folder = write_adapter(tmp_path, trunk)
    read(folder, trunk)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(LoadError, match=message) as refusal:
        read(folder, trunk)
    assert str(folder) in str(refusal.value)


def test_a_refusal_says_what_to_do_instead(tmp_path: Path) -> None:
    trunk = make_trunk()
    with pytest.raises(LoadError, match="merge_and_unload"):
        read(write_adapter(tmp_path, trunk, use_dora=True), trunk)


def add(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(shape)})


def pair(name: str, size_in: int, size_out: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(4, size_in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(size_out, 4)

    return change


def put(side: str, index: tuple[int, int], value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"base_model.model.{Q}.lora_{side}.weight"][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pair("lm_head", 32, 64), "lm_head: adapters on the LM head"),
        (pair("model.embed_tokens", 32, 64), "embed_tokens: adapters on embeddings"),
        (add("model.embed_tokens.lora_embedding_A", 4, 64), "lora_embedding_A: adapters on embeddings"),
        (add("model.embed_tokens.weight", 64, 32), "embed_tokens.weight: this is no LoRA matrix"),
        (add(f"{Q}.lora_magnitude_vector", 32), "DoRA"),
        (add(f"{Q}.lora_B.bias", 32), "biases"),
        (
            pair("model.layers.2.self_attn.q_proj", 32, 32),
            r"layers\.2\.self_attn\.q_proj: the model has no such",
        ),
        (pair("model.layers.0.mlp.experts.0.w1", 32, 32), r"experts\.0\.w1: adapters on experts"),
        (pair("model.norm", 32, 32), r"model\.norm: .* is no linear layer"),
        (pair(Q, 31, 32), r"q_proj: lora_A \[4, 31\] and .* should be \[4, 32\]"),
        (pair(Q, 32, 16), "q_proj: .* for another model"),
        (lambda tensors: tensors.pop(f"base_model.model.{Q}.lora_B.weight"), "lora_B.weight is missing"),
        (add(f"{Q}.lora_A.default.weight", 4, 32), "twice"),
        (lambda tensors: tensors.clear(), "no LoRA weights"),
        (add(f"{Q}.lora_A.weight", 4, 32, 1), "a matrix of floating-point numbers"),
        (put("A", (1, 2), math.nan), "q_proj: NaN or infinity"),
        (put("B", (2, 1), math.inf), "q_proj: NaN or infinity"),
    ],
)
def test_tensors_that_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    trunk = make_trunk()
    with pytest.raises(LoadError, match=message) as refusal:
        read(write_adapter(tmp_path, trunk, tensors=change), trunk)
    assert str(tmp_path) in str(refusal.value)


def test_ranks_must_be_those_of_the_configuration(tmp_path: Path) -> None:
    trunk = make_trunk()
    with pytest.raises(LoadError, match="down_proj: "):
        read(write_adapter(tmp_path, trunk, ranks={DOWN: 3}), trunk)


def test_weights_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    trunk = make_trunk()
    folder = write_adapter(tmp_path, trunk, tensors=put("B", (0, 0), 1e5))
    read(folder, trunk)
    with pytest.raises(LoadError, match=r"q_proj: NaN or infinity among the weights \(as torch.float16\)"):
        read_lora(folder, trunk, dtype=torch.float16, device=torch.device("cpu"))


def test_damaged_folders(tmp_path: Path) -> None:
    trunk = make_trunk()
    folder = write_adapter(tmp_path / "adapter", trunk)
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    with pytest.raises(LoadError, match=r"adapter_model\.safetensors: incomplete or damaged"):
        read(folder, trunk)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(LoadError, match=r"adapter_model\.bin is a pickle and is never opened"):
        read(folder, trunk)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(LoadError, match=r"no adapter_model\.safetensors; save"):
        read(folder, trunk)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(LoadError, match=r"adapter_config\.json: cannot be read"):
        read(folder, trunk)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(LoadError, match="a JSON object"):
        read(folder, trunk)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(LoadError, match=r"no adapter_config\.json"):
        read(folder, trunk)
    with pytest.raises(LoadError, match="no such folder"):
        read(tmp_path / "elsewhere", trunk)


def test_merging_into_another_model_is_refused(tmp_path: Path) -> None:
    trunk = make_trunk()
    weights = read(write_adapter(tmp_path, trunk), trunk)
    with pytest.raises(LoadError, match=r"q_proj\.weight"):
        merge_lora(make_trunk("gpt2").state_dict(), weights)


# What peft writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": "all-linear", "r": 3, "lora_alpha": 16, "use_rslora": True}),
        ("llama", {"target_modules": r".*\.layers\.1\..*(up|down)_proj", "init_lora_weights": "gaussian"}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "k_proj", "down_proj"],
                "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.down_proj": 5},
                "alpha_pattern": {"k_proj": 1, r"layers\.0\.mlp\.down_proj": 64},
                "use_rslora": True,
            },
        ),
        ("qwen3", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
        ("gemma2", {"target_modules": "all-linear"}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": "all-linear", "init_lora_weights": "orthogonal", "r": 4}),
    ],
)
def test_what_peft_writes_is_read_as_peft_merges_it(
    architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    trunk = make_trunk(architecture)
    adapted = peft.get_peft_model(
        make_trunk(architecture), peft.LoraConfig(**{"task_type": "CAUSAL_LM", **config})
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path)
    weights = read(tmp_path, trunk)
    merged = merge_lora(trunk.state_dict(), weights)
    expected = adapted.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert any(not torch.equal(merged[name], tensor) for name, tensor in trunk.state_dict().items())
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}]
)
def test_what_peft_writes_and_is_more_than_a_sum_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_trunk(), peft.LoraConfig(target_modules=["q_proj"], r=2, **config))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="merge_and_unload"):
        read(tmp_path, make_trunk())
