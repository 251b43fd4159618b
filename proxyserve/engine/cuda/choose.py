"""Which kernels a model's attention runs on."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from proxyserve.engine.attention import AttentionPlan, Features, Plan, Span
from proxyserve.engine.cuda.alike import Alike
from proxyserve.engine.cuda.flashinfer import FlashInferAttention
from proxyserve.engine.cuda.singles import GatherSingles, Reserved, TritonSingles
from proxyserve.engine.cuda.varlen import VarlenAttention, find_varlen
from proxyserve.engine.kv_storage import KVStorage, LayerShape

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attention:
    """`plan` makes a plan for one forward of these spans; `reserve` one for captured forwards of so many tokens, of
    lanes of at most so many tokens. `name` is for people."""

    name: str
    plan: Callable[[Sequence[Span], KVStorage], Plan]
    reserve: Callable[[int, KVStorage, int], Reserved]


def choose_attention(
    shapes: Sequence[LayerShape], features: Sequence[Features], dtype: torch.dtype, device: torch.device
) -> Attention:
    """For a model with these layers: a maintained kernel that reads blocks where they lie, if one is installed and can
    do what the layers need; else blocks are gathered, except in captured steps."""
    if device.type != "cuda":
        return Attention("gather", AttentionPlan.of, reserve_gather)
    singles = reserve_gather if importlib.util.find_spec("triton") is None else reserve_triton
    layers = Alike.of(shapes, features, dtype)
    if layers is not None:
        if importlib.util.find_spec("flashinfer") is not None:
            try:
                kernels = FlashInferAttention(importlib.import_module("flashinfer"), layers, device)
            except Exception as error:  # whatever an installation that does not fit this machine raises
                logger.warning("FlashInfer is installed and cannot be used: %s", error)
            else:
                return Attention("flashinfer", kernels.plan, kernels.reserve)
        varlen = find_varlen(device)
        if varlen is not None:
            return Attention("varlen", VarlenAttention(varlen).plan, singles)
    return Attention("gather", AttentionPlan.of, singles)


def reserve_gather(tokens: int, storage: KVStorage, longest: int) -> Reserved:
    """In plain torch."""
    return GatherSingles(tokens, storage, -(-longest // storage.block_size))


def reserve_triton(tokens: int, storage: KVStorage, longest: int) -> Reserved:
    """By the kernel of `proxyserve_kernels`."""
    return TritonSingles(tokens, storage)
