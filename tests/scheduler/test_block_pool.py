"""The block allocator and the keys of the prefix cache."""

from __future__ import annotations

import pytest

from proxyserve.kv.block_pool import BlockPool
from proxyserve.kv.prefix import next_key, root_key
from proxyserve.types import ModelKey

MODEL = ModelKey("atlas")


def test_allocate_takes_all_or_nothing() -> None:
    pool = BlockPool(4)
    held = pool.allocate(3)
    with pytest.raises(MemoryError):
        pool.allocate(2)
    assert pool.available == 1
    pool.release(held)
    assert pool.available == 4
    pool.check()


def test_published_blocks_outlive_their_holder_until_needed() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.publish(first, b"a", MODEL)
    pool.publish(second, b"b", MODEL)
    pool.release([first, second])
    assert pool.match([b"a", b"b", b"c"]) == [first, second]
    assert pool.available == 3 and pool.cached == 2
    # The free block goes first, then the end of the chain; its beginning stays matchable longest.
    pool.allocate(2)
    assert pool.match([b"a", b"b"]) == [first]
    pool.check()


def test_a_reused_block_is_not_evicted() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a", MODEL)
    pool.release([block])
    pool.reuse([block])
    assert pool.available == 1
    with pytest.raises(MemoryError):
        pool.allocate(2)
    pool.release([block])
    pool.check()


def test_double_release_is_found() -> None:
    pool = BlockPool(2)
    held = pool.allocate(1)
    pool.release(held)
    with pytest.raises(ValueError, match="nobody holds"):
        pool.release(held)


def test_withdrawn_blocks_are_found_no_more() -> None:
    pool = BlockPool(3)
    shared, own = pool.allocate(2)
    pool.publish(shared, b"a", MODEL)
    pool.reuse([shared])
    assert pool.withdraw([shared, own]) == [own]
    assert pool.match([b"a"]) == []
    pool.release([shared, own])
    pool.release([shared])
    assert pool.available == 3
    pool.check()


def test_check_finds_a_lost_block() -> None:
    pool = BlockPool(3)
    pool._free.pop()
    with pytest.raises(AssertionError):
        pool.check()


def test_keys_separate_models_generations_salts_and_tokens() -> None:
    roots = {
        root_key(ModelKey("a", 1), ""),
        root_key(ModelKey("a", 2), ""),
        root_key(ModelKey("b", 1), ""),
        root_key(ModelKey("a", 1), "x"),
        root_key(ModelKey("a", 1), "1:"),
    }
    assert len(roots) == 5
    root = min(roots)
    assert next_key(root, [1, 2]) == next_key(root, (1, 2))
    assert (
        len({next_key(root, [1, 2]), next_key(root, [2, 1]), next_key(root, [1]), next_key(root, [258])}) == 4
    )
