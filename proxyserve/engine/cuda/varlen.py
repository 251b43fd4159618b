"""Paged attention by PyTorch's own `torch.nn.attention.varlen`.

Block tables came with torch 2.12 and are a feature of FlashAttention 3 and 4: torch's built-in FlashAttention 2 refuses
them, so one of these must be installed and activated (`torch.nn.attention.activate_flash_attention_impl`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention

from proxyserve.engine.attention import Plan, Span, SpanMath
from proxyserve.engine.cuda.pages import PageLists, slots_of
from proxyserve.engine.kv_storage import KVStorage

_Kernel = Callable[..., Any]


def find_varlen(device: torch.device) -> _Kernel | None:
    """`varlen_attn`, if it takes block tables here. Activates FlashAttention 3 where that is installed and nothing else
    is active (it needs a GPU of compute capability 9.0)."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    if "block_table" not in inspect.signature(varlen.varlen_attn).parameters:
        return None
    if attention.current_flash_attention_impl() is None:
        if torch.cuda.get_device_capability(device) != (9, 0):
            return None
        try:
            attention.activate_flash_attention_impl("FA3")
        except (ImportError, RuntimeError, ValueError):  # not installed, or built without its kernels
            return None
    return varlen.varlen_attn


class VarlenAttention:
    """Plans for a model whose layers have nothing special about them."""

    def __init__(self, kernel: _Kernel) -> None:
        self._kernel = kernel

    def plan(self, spans: Sequence[Span], storage: KVStorage) -> Plan:
        """See `Attention`."""
        device = storage.keys[0].device
        lists = PageLists.of(spans, storage.block_size)
        lengths = [span.start + span.count for span in spans]
        return _Planned(
            storage,
            torch.tensor(slots_of(spans, storage.block_size), device=device),
            self._kernel,
            _Call(
                lists.queries.to(device),
                lists.table().to(device),
                torch.tensor(lengths, dtype=torch.int32, device=device),
                max(span.count for span in spans),
                max(lengths),
            ),
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """`starts` int32 [n + 1] of the spans in the packed row, `table` int32 [n, blocks], `lengths` int32 [n] of the
    contexts, and the most queries and keys of a span."""

    starts: Tensor
    table: Tensor
    lengths: Tensor
    most_queries: int
    most_keys: int


@dataclass(slots=True)
class _Planned:
    storage: KVStorage
    slots: Tensor
    kernel: _Kernel
    call: _Call
    layers: list[int] = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, how: SpanMath, window: int | None) -> Tensor:
        """See `Plan`."""
        call = self.call
        attended: Tensor = self.kernel(
            query.contiguous(),
            self.storage.keys[layer],
            self.storage.values[layer],
            call.starts,
            None,
            call.most_queries,
            call.most_keys,
            scale=how.scale,
            window_size=(-1, 0),
            enable_gqa=query.shape[1] != self.storage.keys[layer].shape[2],
            seqused_k=call.lengths,
            block_table=call.table,
        )
        return attended
