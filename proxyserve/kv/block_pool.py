"""One model's KV blocks: who holds them, which hold reusable prefixes, which are free.

    free ──allocate──▶ held (references > 0) ──release──▶ free          (content unknown)
                         │        ▲                └────▶ evictable     (content published under a key)
                         └publish─┘◀──────reuse──────────────┘
                                       allocate (oldest first) takes evictable blocks when no free one is left

A block is in exactly one of the three states. Published blocks may be held by several lanes at once; their
content never changes while a key points at them, because only full blocks are published.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from proxyserve.types import ModelKey

#: Identifies the content of a block: digest of the model, the salt and all tokens up to the block's end.
BlockKey = bytes


class BlockPool:
    """Allocator of `num_blocks` blocks with reference counts and a cache of published blocks."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}
        self._owner_of: dict[int, ModelKey] = {}

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._evictable)

    @property
    def in_use(self) -> int:
        """Blocks held by at least one lane."""
        return self.num_blocks - self.available

    @property
    def cached(self) -> int:
        """Published blocks that no lane holds; they are reclaimed when `allocate` needs them."""
        return len(self._evictable)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks of unknown content, each with one reference. The caller must have checked `available`;
        asking for more raises MemoryError and takes nothing."""
        if count > self.available:
            raise MemoryError(f"{count} blocks asked for, {self.available} available")
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._unpublish(block)
        self._references[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block. Later blocks of a chain become evictable before earlier ones, so that
        what is left of a half-evicted prefix is its beginning, the part that can still be matched."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ValueError(f"block {block} is released but nobody holds it")
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """The longest run of published blocks for the first of `keys`. Takes no reference."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def reuse(self, blocks: Sequence[int]) -> None:
        """Take one reference to each of these published blocks."""
        for block in blocks:
            if block not in self._key_of:
                raise ValueError(f"block {block} is not published")
            self._evictable.pop(block, None)
            self._references[block] += 1

    def publish(self, block: int, key: BlockKey, owner: ModelKey) -> None:
        """Let later lanes of model `owner` find this full block under `key`. Does nothing if `key` is taken by another
        block (two lanes computed the same prefix at the same time): the first one serves, this one stays private."""
        if self._references[block] < 1:
            raise ValueError(f"block {block} is published but nobody holds it")
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key
            self._owner_of[block] = owner

    def withdraw(self, blocks: Sequence[int]) -> list[int]:
        """No later lane may find these held blocks any more (their content turned out bad). Returns those that
        nobody else holds, whose content the caller may overwrite."""
        for block in blocks:
            if block in self._key_of:
                self._unpublish(block)
        return [block for block in blocks if self._references[block] == 1]

    def drop_cache(self) -> None:
        """Forget every published block that no lane holds."""
        while self._evictable:
            block, _ = self._evictable.popitem()
            self._unpublish(block)
            self._free.append(block)

    def forget(self, owner: ModelKey) -> None:
        """Forget what was published for this model; blocks that no lane holds are free again."""
        for block in [block for block, key in self._owner_of.items() if key == owner]:
            self._unpublish(block)
            if block in self._evictable:
                del self._evictable[block]
                self._free.append(block)

    def _unpublish(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
        del self._owner_of[block]

    def check(self) -> None:
        """Raise AssertionError if any invariant is broken. Cheap enough to run after every step in tests."""
        held = [block for block, count in enumerate(self._references) if count > 0]
        states = sorted(held + self._free + list(self._evictable))
        if states != list(range(self.num_blocks)):
            raise AssertionError("a block is in no state or in two")
        if any(count < 0 for count in self._references):
            raise AssertionError("a block has a negative number of holders")
        if {key: block for block, key in self._key_of.items()} != self._block_of:
            raise AssertionError("the key index and its inverse disagree")
        if self._owner_of.keys() != self._key_of.keys():
            raise AssertionError("a published block has no owner, or one that is not published has")
        if any(block not in self._key_of for block in self._evictable):
            raise AssertionError("an evictable block has no key")
        if any(block in self._key_of for block in self._free):
            raise AssertionError("a free block still has a key")

    def references(self, block: int) -> int:
        """How many lanes hold `block`; for checks."""
        return self._references[block]
