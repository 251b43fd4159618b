"""Attention of captured steps: plans whose tensors never move.

Each token of a captured step is a query of its own over its lane's blocks, so that a step of any lanes, decoding or
verifying drafts, needs no more than `tokens` places. The places that a step leaves empty hold a token 0 at position 0
that reads and writes the storage's spare block.

        inputs   ids | positions | slots | firsts        int64 [4, tokens]
        pages    spare, blocks of lane a, blocks of lane b, ...      firsts says where those of a token's lane begin
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from proxyserve.engine.attention import Span, SpanMath
from proxyserve.engine.cuda.pages import slots_of
from proxyserve.engine.kv_storage import KVStorage

#: Lists of blocks have room for this many times the storage's blocks: lanes may share some.
_SHARING = 2


class Reserved:
    """A `Plan` for `tokens` tokens of any lanes of `storage`, which must have a spare block. `fill` before each
    replay."""

    def __init__(self, tokens: int, storage: KVStorage) -> None:
        if storage.spare is None:
            raise ValueError("captured steps need a KV storage with a spare block")
        self.tokens = tokens
        self.storage = storage
        self.spare: int = storage.spare
        self.layers: list[int] = []
        self.capacity = tokens + _SHARING * storage.num_blocks
        device = storage.keys[0].device
        self.inputs = torch.zeros(4, tokens, dtype=torch.int64, device=device)
        self.slots = self.inputs[2]
        self.pages = torch.full((self.capacity,), self.spare, dtype=torch.int64, device=device)

    def fits(self, spans: Sequence[Span]) -> bool:
        """Whether `fill` can take these spans."""
        pages = 1 + sum(len(span.blocks) for span in spans)
        return sum(span.count for span in spans) <= self.tokens and pages <= self.capacity

    def fill(
        self, ids: Sequence[int], spans: Sequence[Span], upload: Callable[[Tensor, Tensor], None]
    ) -> None:
        """Put this step's tokens in place. `upload` copies a tensor of the host to one of the device."""
        pages = [self.spare]
        firsts: list[int] = []
        positions: list[int] = []
        for span in spans:
            firsts += [len(pages)] * span.count
            positions += range(span.start, span.start + span.count)
            pages += span.blocks
        size = self.storage.block_size
        empty = [0] * (self.tokens - len(ids))
        slots = [*slots_of(spans, size), *[self.spare * size] * len(empty)]
        upload(torch.tensor([[*ids, *empty], [*positions, *empty], slots, [*firsts, *empty]]), self.inputs)
        upload(torch.tensor(pages), self.pages[: len(pages)])
        self.prepare(spans)

    def prepare(self, spans: Sequence[Span]) -> None:
        """What else must be in place before a replay."""

    def attend(self, layer: int, query: Tensor, how: SpanMath, window: int | None) -> Tensor:
        """See `Plan`."""
        raise NotImplementedError


class TritonSingles(Reserved):
    """By the kernel of `proxyserve_kernels`, which has every feature."""

    def attend(self, layer: int, query: Tensor, how: SpanMath, window: int | None) -> Tensor:
        """See `Plan`."""
        from proxyserve_kernels.triton_backend.paged import attend_pages

        return attend_pages(
            query.contiguous(),
            self.storage.keys[layer],
            self.storage.values[layer],
            self.pages,
            self.inputs[3],
            self.inputs[1],
            scale=how.scale,
            softcap=how.softcap,
            window=window,
            sinks=how.sinks,
        )


class GatherSingles(Reserved):
    """In plain torch: gathers as many blocks for every token as the longest lane may have, `blocks`. The slow twin of
    the kernels."""

    def __init__(self, tokens: int, storage: KVStorage, blocks: int) -> None:
        super().__init__(tokens, storage)
        self._blocks = blocks

    def attend(self, layer: int, query: Tensor, how: SpanMath, window: int | None) -> Tensor:
        """See `Plan`."""
        keys, values = self.storage.keys[layer], self.storage.values[layer]
        positions, firsts = self.inputs[1][:, None], self.inputs[3][:, None]
        reach = torch.arange(self._blocks, device=query.device)
        # What lies beyond a token's own blocks is another block of the same lane, and hidden below.
        own = torch.minimum(reach, positions // self.storage.block_size)
        table = self.pages[firsts + own].flatten()
        shape = (self.tokens, self._blocks * self.storage.block_size)
        key, value = (
            tensor.index_select(0, table).view(*shape, *tensor.shape[2:]).transpose(1, 2)
            for tensor in (keys, values)
        )
        distance = positions - torch.arange(shape[1], device=query.device)
        hidden = distance < 0
        if window is not None:
            hidden = hidden | (distance >= window)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill(hidden, -math.inf)[:, None, None]
        return how(query[:, :, None], key, value, mask)[:, :, 0]
