"""KV memory. Models whose layers store alike share one arena: an expert that is swapped for another of its shape takes
over the blocks of the old one, and adapters over one model need no blocks of their own. Prefix-cache keys keep them
apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proxyserve.engine.kv_storage import KVStorage, LayerShape, bytes_per_token
from proxyserve.kv.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class Layout:
    """What one token's KV looks like in memory."""

    shapes: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device

    def block_bytes(self, block_size: int) -> int:
        return bytes_per_token(self.shapes, self.dtype) * block_size


class Arena:
    """`num_blocks` blocks of `block_size` tokens: who holds them (`pool`) and what is in them (`storage`)."""

    def __init__(self, layout: Layout, num_blocks: int, block_size: int) -> None:
        self.layout = layout
        self.pool = BlockPool(num_blocks)
        self.storage = KVStorage(
            layout.shapes,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=layout.dtype,
            device=layout.device,
        )

    @property
    def tokens(self) -> int:
        return self.pool.num_blocks * self.storage.block_size

    @property
    def bytes(self) -> int:
        return self.storage.bytes
