"""The memory plan: how many KV blocks each model gets out of one budget."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from proxyserve.engine.kv_storage import LayerShape, bytes_per_token
from proxyserve.errors import LoadError
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.remote import RemoteModel
from proxyserve.types import ModelKey

_CPU_SHARE, _CPU_MOST = 0.25, 2 * 2**30
_GPU_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Bytes of one model: its weights, its KV blocks, and how many tokens those hold."""

    weights: int
    kv: int
    blocks: int
    tokens: int


def plan_memory(
    shapes: Mapping[ModelKey, Sequence[LayerShape]],
    models: Mapping[ModelKey, LoadedModel],
    *,
    budget: int | None,
    block_size: int,
    max_batch: int,
) -> dict[ModelKey, ModelMemory]:
    """Give every model the same number of blocks, as many as `budget` bytes allow (None: a default for the device),
    since every lane of a request grows by the same tokens. No model gets more than `max_batch` full contexts.

    Raises LoadError if the budget does not hold even two blocks per model.
    """
    if not shapes:
        return {}
    block_bytes = {key: bytes_per_token(shapes[key], models[key].dtype) * block_size for key in shapes}
    total = _default_budget(next(iter(models.values())).device) if budget is None else budget
    blocks = total // sum(block_bytes.values())
    if blocks < 2:
        raise LoadError(
            f"a KV budget of {total} bytes holds {blocks} blocks of {block_size} tokens for {len(shapes)} models; "
            f"give --kv-memory at least {2 * sum(block_bytes.values())} bytes"
        )
    plan = {}
    for key, size in block_bytes.items():
        most = max_batch * -(-models[key].context_length // block_size)
        own = min(blocks, most)
        plan[key] = ModelMemory(models[key].bytes, own * size, own, own * block_size)
    return plan


def plan_remote(model: RemoteModel, *, block_size: int, max_batch: int, lanes: int) -> ModelMemory:
    """Blocks without bytes, enough for `max_batch` full contexts and for one request with `lanes` lanes on the
    model."""
    blocks = (max_batch + lanes) * -(-model.context_length // block_size)
    return ModelMemory(0, 0, blocks, blocks * block_size)


def _default_budget(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _GPU_SHARE)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(int(physical * _CPU_SHARE), _CPU_MOST)
