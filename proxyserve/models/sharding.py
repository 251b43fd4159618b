"""One base in several processes: each loads its part of the weights, and says what its layers must do together.

The parts are cut by the plan that transformers has for the model's class, and read by it: a process reads its own part
of the files only. What transformers leaves behind are distributed tensors, which cost the host more time in each layer
than a GPU needs to compute it. So they become plain tensors, and what is left of the plan is a list of layers whose
inputs or outputs the processes have to exchange (`engine.sharded.collectives` does).

        q, k, v, gate, up:  columns ──▶ attention with the heads of this rank ──▶ o, down:  a sum over the ranks
        embedding:          rows of the table, a sum over the ranks                head:     columns, gathered
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from proxyserve.errors import LoadError
from proxyserve.models.loaded_model import LoadedModel, Sharding, Together
from proxyserve.models.loading import (
    Placement,
    Whole,
    load_config,
    make_loaded,
    parameter_count,
    whole_model,
)
from proxyserve.models.prequantized import refuse_quantized
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey

#: What the processes do together for a layer of each of the plan's styles; None for nothing.
_TOGETHER: Mapping[str, Literal["sum", "split and sum", "gather", "look up"] | None] = {
    "colwise": None,
    "packed_colwise": None,  # gates and values of a mixture's experts: of each its own columns
    "replicated_with_grad_allreduce": None,
    "rowwise": "sum",
    "moe_tp_experts": "sum",
    "rowwise_split_input": "split and sum",
    "rowwise_rep": "split and sum",
    "colwise_gather_output": "gather",
    "colwise_rep": "gather",
    "embedding_rowwise": "look up",
}
#: Layers whose outputs hold keys: where their columns are divided, so are the heads.
_KEYS = ("k_proj", "qkv_proj", "query_key_value", "kv_b_proj")


def check_shardable(config: PreTrainedConfig, size: int, where: str) -> None:
    """Raise LoadError unless a model of this configuration can be divided into `size` parts. Reads no weights."""
    refuse_quantized(config, where, "a base that --tensor-parallel divides")
    with torch.device("meta"):
        plan = _plan_of(AutoModelForCausalLM.from_config(config))
    kind = config.model_type
    if not plan:
        raise LoadError(
            f"{where}: transformers has no tensor-parallel plan for '{kind}', so --tensor-parallel cannot divide it; "
            "serve it without, or take a family that has one (Llama, Qwen, Mistral, Gemma, Phi, OLMo, Granite, ...)"
        )
    unknown = sorted(set(plan.values()) - _TOGETHER.keys())
    if unknown:
        raise LoadError(
            f"{where}: the tensor-parallel plan of '{kind}' divides layers in ways that are not served "
            f"({', '.join(unknown)}); serve it without"
        )
    if not any(style == "colwise" and name.endswith(_KEYS) for name, style in plan.items()):
        return
    text = config.get_text_config()
    heads = text.num_attention_heads
    for what, number in (
        ("attention heads", heads),
        ("key and value heads", getattr(text, "num_key_value_heads", None) or heads),
    ):
        if number % size:
            fitting = [str(parts) for parts in range(2, number + 1) if number % parts == 0]
            raise LoadError(
                f"{where}: --tensor-parallel {size} does not divide its {number} {what}; "
                f"use {' or '.join(fitting) or 'no --tensor-parallel'}"
            )


def load_shard(path: str | Path, key: ModelKey, placement: Placement, rank: int, size: int) -> LoadedModel:
    """This process's part of a Hugging Face folder. All `size` processes of the default group of `torch.distributed`
    must call it, with the same arguments. Raises LoadError."""
    folder = Path(path).expanduser()
    config = load_config(folder)
    check_shardable(config, size, str(folder))
    tokenizer = Tokenizer.load(folder)
    module = whole_model(
        AutoModelForCausalLM,
        folder,
        f"{folder}: part {rank + 1} of {size}",
        config=config,
        dtype=placement.dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        distributed_config=DistributedConfig(tp_size=size),
    )
    width, parameters = int(module.get_output_embeddings().out_features), parameter_count(module)
    whole = Whole(width, parameters, _as_plain_tensors(module, rank, size))
    return make_loaded(folder, key, module, tokenizer, placement, whole=whole)


def _plan_of(module: PreTrainedModel) -> dict[str, str]:
    """The plan's style of each module and parameter that it names and the model has."""
    plan: Mapping[str, str] = getattr(module, "tp_plan", None) or {}
    names = [name for name, _ in (*module.named_modules(), *module.named_parameters())]
    generic = {name: re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names}
    return {name: plan[generic[name]] for name in names if generic[name] in plan}


def _as_plain_tensors(module: PreTrainedModel, rank: int, size: int) -> Sharding:
    """Replace distributed parameters by this rank's part of them, tied ones by one, and take transformers' own
    exchanges off the layers."""
    styles, layers = _plan_of(module), dict[str, Together]()
    local: dict[int, nn.Parameter] = {}
    for name, layer in module.named_modules():
        layer.__dict__.pop("forward", None)
        how = _TOGETHER[styles[name]] if name in styles else None
        if how is not None:
            whole = getattr(layer, "out_features" if how == "gather" else "in_features", 0)
            layers[name] = Together(how, layer.num_embeddings if isinstance(layer, nn.Embedding) else whole)
        for own, parameter in list(layer.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if id(parameter) not in local:
                    local[id(parameter)] = nn.Parameter(parameter.to_local(), requires_grad=False)
                setattr(layer, own, local[id(parameter)])
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
            if how in ("sum", "split and sum") and layer.bias is not None and rank:
                layer.bias = nn.Parameter(
                    torch.zeros_like(layer.bias), requires_grad=False
                )  # it is added once
    return Sharding(rank, size, layers)
