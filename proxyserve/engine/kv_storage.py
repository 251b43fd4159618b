"""The tensors behind a model's KV blocks: one pool per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores per token: heads and the sizes of a key and of a value head."""

    heads: int
    key_size: int
    value_size: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.heads * (self.key_size + self.value_size) * dtype.itemsize


class KVStorage:
    """Keys and values of `num_blocks` blocks of `block_size` tokens, per layer.

    `keys[layer]` is [num_blocks, block_size, heads, key_size] and `values[layer]` likewise; token t of a lane lives in
    block `lane.blocks[t // block_size]` at offset `t % block_size`. With `spare`, there is one block more that no lane
    is ever given: padding of captured steps is written to and read from there.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        spare: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        #: Id of the spare block.
        self.spare = num_blocks if spare else None
        allocated = num_blocks + spare
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for shape in shapes:
            # One allocation per layer holds both. It is zeroed: padded positions are read (and masked), and a stray
            # NaN there would survive the mask as NaN * 0.
            slots = allocated * block_size * shape.heads
            pool = torch.zeros(slots * (shape.key_size + shape.value_size), dtype=dtype, device=device)
            split = slots * shape.key_size
            self.keys.append(pool[:split].view(allocated, block_size, shape.heads, shape.key_size))
            self.values.append(pool[split:].view(allocated, block_size, shape.heads, shape.value_size))

    def clear(self, blocks: Sequence[int], start: int = 0) -> None:
        """Zero these blocks from their token number `start` on. Needed after NaN: masked positions are multiplied by 0,
        which does not remove a NaN."""
        whole = -(-start // self.block_size)
        for tensor in (*self.keys, *self.values):
            tensor[list(blocks[whole:])] = 0
            if whole * self.block_size > start:
                tensor[blocks[whole - 1], start % self.block_size :] = 0

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))


def bytes_per_token(shapes: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """KV bytes of one token over all layers."""
    return sum(shape.bytes_per_token(dtype) for shape in shapes)
