"""Blocks worked by hand, and invariants under random operations."""

import random

import pytest

from engines.kv_cache import BlockManager, block_key, root_key


def _keys(tenant: str, *blocks: tuple[int, ...]) -> list[bytes]:
    keys = [root_key(tenant)]
    for token_ids in blocks:
        keys.append(block_key(keys[-1], token_ids))
    return keys[1:]


def test_a_prefix_is_found_until_its_memory_is_needed() -> None:
    blocks = BlockManager(5)
    keys = _keys("a", (1, 2), (3, 4), (5, 6))
    first = blocks.allocate(3)
    assert first == [1, 2, 3]  # block 0 is padding's
    for block, key in zip(first, keys, strict=True):
        blocks.set_key(block, key)
    blocks.release(first)
    assert blocks.num_free == 4
    assert blocks.find(keys) == first
    assert blocks.allocate(1) == [4]  # the block without a key goes first
    blocks.hold(first[:1])
    assert blocks.allocate(1) == [3]  # then the end of the chain
    assert blocks.find(keys) == [1, 2]
    assert blocks.num_unheld([1, 2]) == 1


def test_a_block_has_as_many_lives_as_holders() -> None:
    blocks = BlockManager(3)
    held = blocks.allocate(2)
    blocks.hold(held)
    blocks.release(held)
    assert blocks.num_free == 0
    assert blocks.discard(held) == held
    blocks.release(held)
    assert blocks.num_free == 2


def test_keys_tell_apart_what_differs() -> None:
    root = root_key("a")
    keys = {
        *_keys("a", (1, 2), (3, 4)),
        *_keys("b", (1, 2), (3, 4)),
        *_keys("a", (3, 4)),
        *_keys("a", (1, 2), (3, 5)),
        block_key(root, (1, -1), b"row"),
        block_key(root, (1, -1), b"rows"),
    }
    assert len(keys) == 8
    assert _keys("a", (1, 2)) == _keys("a", (1, 2))


def test_the_first_block_keeps_a_key() -> None:
    blocks = BlockManager(4)
    first, second = blocks.allocate(2)
    (key,) = _keys("", (1,))
    blocks.set_key(first, key)
    blocks.set_key(second, key)
    assert blocks.find([key]) == [first]
    blocks.release([first, second])
    assert blocks.allocate(2) == [second, 3]
    assert blocks.find([key]) == [first]


def test_a_cache_of_padding_only_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        BlockManager(1)


@pytest.mark.parametrize("seed", range(5))
def test_free_and_used_are_all(seed: int) -> None:
    """Random holders that share prefixes: no block is lost, owned twice, or found with another's key."""
    choose = random.Random(seed)
    blocks = BlockManager(7)
    tables: list[list[int]] = []
    written: dict[int, bytes] = {}
    for _ in range(500):
        if tables and choose.random() < 0.5:
            blocks.release(tables.pop(choose.randrange(len(tables))))
        else:
            chain = _keys("", *[(choose.randrange(2),) for _ in range(choose.randint(1, 4))])
            found = blocks.find(chain)
            assert [written[block] for block in found] == chain[: len(found)]
            if len(chain) - len(found) + blocks.num_unheld(found) > blocks.num_free:
                continue
            blocks.hold(found)
            fresh = blocks.allocate(len(chain) - len(found))
            assert not set(fresh) & {block for table in [*tables, found] for block in table}
            tables.append(found + fresh)
            for block, key in zip(tables[-1], chain, strict=True):
                if block in fresh:
                    written[block] = key
                blocks.set_key(block, key)
        used = {block for table in tables for block in table}
        assert 0 not in used
        assert len(used) + blocks.num_free == blocks.num_usable
