"""The pool of a model that keeps no KV here: blocks to count with, and nothing in them."""

from __future__ import annotations

from proxyserve.kv.block_pool import BlockKey, BlockPool
from proxyserve.types import ModelKey


class VirtualPool(BlockPool):
    """Hands out block numbers as `BlockPool` does, so that the scheduler needs no second way. Nothing is published:
    there is no content to find again, and no prompt token may be reported as cached."""

    def publish(self, block: int, key: BlockKey, owner: ModelKey) -> None:
        """Nothing to do."""
