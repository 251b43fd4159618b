"""KV memory. Models whose layers store alike share one arena: an expert that is swapped for another of its shape takes
over the blocks of the old one, and adapters over one model need no blocks of their own. Prefix-cache keys keep them
apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

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


def expected_layout(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Layout:
    """By a model's configuration alone, before it is loaded; `Runner.layout` says what it really is."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    shape = LayerShape(getattr(text, "num_key_value_heads", None) or heads, size, size)
    return Layout((shape,) * text.num_hidden_layers, dtype, device)


class Arena:
    """`num_blocks` blocks of `block_size` tokens: who holds them (`pool`) and what is in them (`storage`). `spare`: the
    storage has a block more, for captured steps."""

    def __init__(self, layout: Layout, num_blocks: int, block_size: int, *, spare: bool = False) -> None:
        self.layout = layout
        self.pool = BlockPool(num_blocks)
        self.storage = KVStorage(
            layout.shapes,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=layout.dtype,
            device=layout.device,
            spare=spare,
        )

    @property
    def tokens(self) -> int:
        return self.pool.num_blocks * self.storage.block_size

    @property
    def bytes(self) -> int:
        return self.storage.bytes
