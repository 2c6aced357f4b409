"""Who holds which block of the paged KV cache (PagedAttention, Kwon et al. 2023, arXiv:2309.06180).

A block that is full and computed gets a key: a hash over everything before it and in it, from the tenant's salt on. A
later request with the same beginning takes such blocks instead of computing them, and holds them together with whoever
else does. A block that nobody holds stays findable until its memory is needed, least recently freed first.
Block 0 is nobody's: block tables are padded with it.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

KEY_BYTES = 32


def root_key(tenant: str) -> bytes:
    """The key before a request's first block. Another tenant's blocks have other keys, so they are never found."""
    return hashlib.blake2b(tenant.encode(), digest_size=KEY_BYTES, person=b"tenant").digest()


def block_key(previous_key: bytes, token_ids: Sequence[int], rows: bytes = b"") -> bytes:
    """Key of a block, from that of the block before it.

    Args:
        rows: the embedding rows that stand at the block's placeholders.
    """
    digest = hashlib.blake2b(previous_key, digest_size=KEY_BYTES, person=b"block")
    digest.update(array("q", token_ids).tobytes())
    digest.update(rows)
    return digest.digest()


class BlockManager:
    """Counts references to blocks; knows nothing of requests or tensors.

    Args:
        num_blocks: blocks of the cache, block 0 included.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(
                f"num_blocks is {num_blocks}, at least 2 are needed: block 0 is padding"
            )
        self.num_usable = num_blocks - 1
        self._num_references = [0] * num_blocks
        # In the order in which they are taken: blocks without a key first, then the longest unused.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those that can still be found by key included."""
        return len(self._free)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of `keys`. They are not held yet."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` would stop being free if they were held."""
        return sum(1 for block in blocks if self._num_references[block] == 0)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to blocks that `find` gave."""
        for block in blocks:
            if self._num_references[block] == 0:
                del self._free[block]
            self._num_references[block] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Blocks for one holder, contents undefined; at most `num_free`. They lose their keys."""
        assert num_blocks <= len(self._free)
        blocks = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in blocks:
            self._num_references[block] = 1
            self._forget_key(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take a holder from each block, in a request's order of blocks.

        The last block is freed first, since a block is of use only to those who find all before it.
        """
        for block in reversed(blocks):
            self._num_references[block] -= 1
            assert self._num_references[block] >= 0
            if self._num_references[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._key_of)

    def set_key(self, block: int, key: bytes) -> None:
        """Make a held block findable; the first block with a key keeps it."""
        assert self._num_references[block] > 0
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def discard(self, blocks: Iterable[int]) -> list[int]:
        """Make blocks unfindable, and name those with one holder: what is in them must not be used again."""
        alone = []
        for block in blocks:
            self._forget_key(block)
            if self._num_references[block] == 1:
                alone.append(block)
        return alone

    def _forget_key(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
