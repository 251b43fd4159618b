"""Paged attention by FlashInfer's kernels, where that package is installed.

https://docs.flashinfer.ai/api/attention.html: pages are [blocks, block_size, heads, size] ("NHD"), which is how
`KVStorage` keeps them; a causal query sees the keys up to its own, the last query the last key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from proxyserve.engine.attention import Plan, Span, SpanMath
from proxyserve.engine.cuda.alike import Alike
from proxyserve.engine.cuda.pages import PageLists, slots_of
from proxyserve.engine.cuda.singles import Reserved
from proxyserve.engine.kv_storage import KVStorage

#: What the kernels may write partial results to; the size that their documentation recommends.
WORKSPACE_BYTES = 128 * 2**20


class FlashInferAttention:
    """Plans for a model whose layers are alike. Forwards of one instance must not overlap: they share a workspace."""

    def __init__(self, library: ModuleType, layers: Alike, device: torch.device) -> None:
        self._library = library
        self._layers = layers
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._ragged = library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")

    def plan(self, spans: Sequence[Span], storage: KVStorage) -> Plan:
        """See `Attention`."""
        lists, layers = PageLists.of(spans, storage.block_size), self._layers
        self._ragged.plan(
            lists.queries,
            lists.starts,
            lists.pages,
            lists.last,
            layers.heads,
            layers.kv_heads,
            layers.size,
            storage.block_size,
            causal=True,
            sm_scale=layers.scale,
            q_data_type=layers.dtype,
            kv_data_type=layers.dtype,
        )
        slots = torch.tensor(slots_of(spans, storage.block_size), device=storage.keys[0].device)
        return _Planned(storage, slots, self._ragged)

    def reserve(self, tokens: int, storage: KVStorage, longest: int) -> Reserved:
        """See `Attention`."""
        return FlashInferSingles(self._library, self._workspace, self._layers, tokens, storage)


@dataclass(slots=True)
class _Planned:
    storage: KVStorage
    slots: Tensor
    wrapper: object
    layers: list[int] = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, how: SpanMath, window: int | None) -> Tensor:
        """See `Plan`."""
        pages = (self.storage.keys[layer], self.storage.values[layer])
        attended: Tensor = self.wrapper.run(query.contiguous(), pages)  # type: ignore[attr-defined]
        return attended


class FlashInferSingles(Reserved):
    """The package's wrapper for captured decode steps: its buffers stay where they are, `fill` plans anew."""

    def __init__(
        self, library: ModuleType, workspace: Tensor, layers: Alike, tokens: int, storage: KVStorage
    ) -> None:
        super().__init__(tokens, storage)
        self._layers = layers
        device = storage.keys[0].device

        def ints(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        self._wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=ints(tokens + 1),
            paged_kv_indices_buffer=ints(self.capacity),
            paged_kv_last_page_len_buffer=ints(tokens),
        )

    def fits(self, spans: Sequence[Span]) -> bool:
        """See `Reserved`. Each token has a list of its own here."""
        size = self.storage.block_size
        pages = sum(span.count * -(-(span.start + span.count) // size) for span in spans)
        return super().fits(spans) and pages + self.tokens <= self.capacity

    def prepare(self, spans: Sequence[Span]) -> None:
        """See `Reserved`."""
        layers, size = self._layers, self.storage.block_size
        singles = [
            Span(span.blocks, position, 1)
            for span in spans
            for position in range(span.start, span.start + span.count)
        ]
        singles += [Span((self.spare,), 0, 1)] * (self.tokens - len(singles))
        lists = PageLists.of(singles, size)
        self._wrapper.plan(
            lists.starts,
            lists.pages,
            lists.last,
            layers.heads,
            layers.kv_heads,
            layers.size,
            size,
            sm_scale=layers.scale,
            q_data_type=layers.dtype,
            kv_data_type=layers.dtype,
        )

    def attend(self, layer: int, query: Tensor, how: SpanMath, window: int | None) -> Tensor:
        """See `Plan`."""
        pages = (self.storage.keys[layer], self.storage.values[layer])
        attended: Tensor = self._wrapper.run(query.contiguous(), pages)
        return attended
