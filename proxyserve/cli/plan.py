"""What serving a set of folders would take, without reading their weights: by the functions that plan a real start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from proxyserve.cli.settings import ServeSettings
from proxyserve.engine.arena import Layout, expected_layout
from proxyserve.engine.cpu_linear import expected_doubled_bytes
from proxyserve.engine.memory import Tenants, kv_budget, memory_limit, plan_arenas, scoring_bytes, spelled
from proxyserve.engine.settling import settle_dtype
from proxyserve.engine.sharded.ranks import check_ranks
from proxyserve.errors import LoadError
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.loading import Placement, context_length, load_config
from proxyserve.models.model_set import ModelSet
from proxyserve.models.prequantized import (
    check_prequantized,
    is_spelled_out,
    method_of,
    refuse_quantized,
)
from proxyserve.models.quantization import check_quantization
from proxyserve.models.sharding import check_shardable
from proxyserve.models.support import refuse_unsupported_module
from proxyserve.models.upstream import RemoteSource
from proxyserve.models.vocabulary import SharedVocabulary
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import ModelKey


@dataclass(frozen=True, eq=False, kw_only=True)
class UnreadModel(LoadedModel):
    """A model whose `module` has shapes and no numbers; `placement` is where it would be."""

    placement: Placement

    @property
    def dtype(self) -> torch.dtype:
        return self.placement.dtype

    @property
    def device(self) -> torch.device:
        return self.placement.device


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """`kv_tokens` are those of the arena that it shares with models of its layout, whose first it is; 0 for the
    others, and for a base on another server. Sizes are in bytes."""

    name: str
    parameters: int
    weights: int
    kv: int
    kv_tokens: int
    context: int


@dataclass(frozen=True, slots=True)
class Plan:
    """`weights` and `kv` are together at most `limit`; `scoring` is beside them. `shared` has, by expert, the tokens
    that it shares with the base. `dtype` says why, too."""

    models: Sequence[PlannedModel]
    shared: dict[str, int]
    dtype: str
    weights: int
    kv: int
    limit: int
    scoring: int
    messages: Sequence[str]


def make_plan(
    base: Path | RemoteSource,
    experts: Sequence[ExpertSource],
    settings: ServeSettings,
    *,
    served_name: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Plan:
    """Raises LoadError for what a start would refuse: folders that are broken, tokenizers that do not match, memory
    that does not do. Experts that are no whole models cannot be planned for and are only told of."""
    config, messages = settings.engine, []
    whole = [source for source in experts if (source.tuned.expanduser() / "config.json").is_file()]
    for source in experts:
        if not source.tuned.expanduser().exists():
            raise LoadError(f"expert '{source.name}': {source.tuned}: no such folder")
        if source not in whole:
            messages.append(f"expert '{source.name}' is no whole model; the plan is without it")
    folders = [path for source in whole for path in (source.tuned, source.untuned) if path is not None]
    local = base if isinstance(base, Path) else None
    placed = settle_dtype(config.device, config.dtype, local, folders)
    placement = placed.value
    if config.tensor_parallel > 1:
        if local is None:
            raise LoadError("--tensor-parallel is for a base in this process, not for one on another server")
        check_ranks(config.tensor_parallel, placement, config.device)
        check_shardable(load_config(local.expanduser()), config.tensor_parallel, str(local))
        messages.append(
            f"of the base the plan has about what each of {config.tensor_parallel} processes holds; its KV has room "
            f"for about {config.tensor_parallel} times as many tokens (--tensor-parallel)"
        )
    models = load_family(
        base, whole, base_name=served_name, placement=placement, progress=progress, read=read_shapes
    )
    if config.quantize is not None:
        check_quantization(config.quantize, placement.device, placement.dtype)
        models = _quantized(models, config.quantize)
        messages.append("what --quantize saves is an estimate")
    aside = scoring_bytes(models.base, config)
    limit = memory_limit(placement.device, settings.experts.memory, aside)
    unread = [model for model in models.models.values() if isinstance(model, UnreadModel)]
    weights = {model.key: _bytes(model) for model in unread}
    if models.base.key in weights:
        weights[models.base.key] = -(-weights[models.base.key] // config.tensor_parallel)
    left = limit - sum(weights.values())
    if left <= 0:
        [need, most] = spelled([sum(weights.values()), limit])
        raise LoadError(
            f"the weights alone need {need}, and there are {most}: give more (--memory), serve less, or store the base "
            "in fewer bits (--quantize)"
        )
    if config.kv_memory is not None and config.kv_memory > left:
        [wanted, most] = spelled([config.kv_memory, left])
        messages.append(f"--kv-memory is {wanted}, and the memory leaves {most} for it beside the weights")
    tenants: dict[Layout, Tenants] = {}
    layouts: dict[ModelKey, Layout] = {}
    for model in unread:
        layout = expected_layout(model.module.config, placement.dtype, placement.device)
        layouts[model.key] = layout
        known = tenants.get(layout, Tenants(0, 0))
        tenants[layout] = Tenants(known.models + 1, max(known.context, model.context_length))
    blocks_of = plan_arenas(
        tenants,
        budget=min(kv_budget(placement.device, config.kv_memory), left),
        block_size=config.block_size,
        max_batch=config.max_batch,
    )
    planned, shown = [], set()
    for each in models.models.values():
        blocks = 0
        block_bytes = 0
        if each.key in layouts and layouts[each.key] not in shown:
            layout = layouts[each.key]
            shown.add(layout)
            blocks, block_bytes = blocks_of[layout], layout.block_bytes(config.block_size)
        planned.append(
            PlannedModel(
                each.name,
                each.parameters if isinstance(each, UnreadModel) else 0,
                weights.get(each.key, 0),
                blocks * block_bytes,
                blocks * config.block_size,
                each.context_length,
            )
        )
    return Plan(
        planned,
        {name: len(expert.vocabulary.ids()) for name, expert in models.experts.items()},
        f"{placement.dtype} on {placement.device} ({placed.reason})".replace("torch.", "", 1),
        sum(weights.values()),
        sum(model.kv for model in planned),
        limit,
        aside,
        messages,
    )


def read_shapes(path: Path, key: ModelKey, placement: Placement, *, quantized: bool = False) -> UnreadModel:
    """All of a folder but the numbers in its weight files, which may be `quantized`. Raises LoadError."""
    folder = path.expanduser()
    config = load_config(folder)
    method = method_of(config)
    if method is not None:
        if not quantized:
            refuse_quantized(config, str(folder), "an expert's models")
        check_prequantized(config, placement.device, str(folder))
    tokenizer = Tokenizer.load(folder)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    module.eval().requires_grad_(False)
    refuse_unsupported_module(module, str(folder))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return UnreadModel(
        key=key,
        path=folder.resolve(),
        module=module,
        tokenizer=tokenizer,
        context_length=context_length(config, str(folder)),
        eos_ids=frozenset(tokenizer.eos_ids),
        vocabulary=SharedVocabulary.of(
            tokenizer.token_to_id, int(module.get_output_embeddings().weight.shape[0])
        ),
        parameters=parameters,
        bytes=parameters * placement.dtype.itemsize
        if method is None or is_spelled_out(method)
        else sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        placement=placement,
    )


def _bytes(model: UnreadModel) -> int:
    """With what packed layers take beyond their own, on a CPU."""
    if model.device.type != "cpu":
        return model.bytes
    return model.bytes + expected_doubled_bytes(model.module, model.dtype)


def _quantized(models: ModelSet, bits: str) -> ModelSet:
    """With the linear layers of the base, but for its head, in so many bits, and a scale of two bytes for each row
    (int8) or 128 weights (int4)."""
    base = models.base
    if not isinstance(base, UnreadModel):
        return models
    head = base.module.get_output_embeddings()
    saved = 0
    for layer in base.module.modules():
        if type(layer) is nn.Linear and layer is not head:
            size, rows = layer.weight.numel(), layer.weight.shape[0]
            stored = size + 2 * rows if bits == "int8" else size // 2 + 2 * size // 128
            saved += size * base.dtype.itemsize - stored
    return ModelSet(replace(base, bytes=base.bytes - saved), models.experts.values())
