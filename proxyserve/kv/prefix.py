"""Keys of the prefix cache: a chain of digests, one per full block.

Each key covers the model with its generation, the salt and all tokens from the start to the end of its block,
so equal keys mean equal KV content. BLAKE2b keeps an accidental or crafted collision out of reach; Python's
own `hash` would not.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

from proxyserve.kv.block_pool import BlockKey
from proxyserve.types import ModelKey

_DIGEST_BYTES = 16


def root_key(model: ModelKey, salt: str) -> BlockKey:
    """The key before the first block. The length prefix keeps `("ab", "c")` and `("a", "bc")` apart."""
    text = f"{len(model.name)}:{model.name}:{model.generation}:{salt}"
    return blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()


def next_key(previous: BlockKey, tokens: Iterable[int]) -> BlockKey:
    """The key of the block that holds `tokens` and follows the block of `previous`."""
    return blake2b(previous + array("q", tokens).tobytes(), digest_size=_DIGEST_BYTES).digest()
