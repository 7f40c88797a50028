"""Which KV block holds what: reference counts, a prefix cache, a free list. Knows no tensor."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0  # padded table entries point here; what is written to it is never read


def root_hash(*, adapter_digest: str, cache_salt: str, weights: int = 0) -> bytes:
    """Return the parent of a sequence's first block.

    Tagged and length-prefixed, so that an adapter can never be mistaken for a salt. The digest,
    not the name, tells adapters apart: a name may be given new weights. `weights` counts how often
    the model itself was.
    """
    parts = [
        f"adapter:{len(adapter_digest)}:{adapter_digest}",
        f"salt:{len(cache_salt)}:{cache_salt}",
        f"weights:{weights}",
    ]
    return hashlib.sha256("|".join(parts).encode()).digest()


def next_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the hash of a full block that follows `parent`."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


class BlockPool:
    """Hands out blocks and remembers full ones for sequences that begin alike.

    Every block but the reserved one is either used (reference count above zero) or free. A free
    block may still be cached: it is given away last, least recently used first.
    """

    def __init__(self, *, num_blocks: int, block_size: int, enable_caching: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError("a pool needs the reserved block and one more")
        self.block_size = block_size
        self.total = num_blocks - 1
        self._caching = enable_caching
        self._refs = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._cached_free: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """How many blocks can be handed out."""
        return len(self._blank) + len(self._cached_free)

    @property
    def used(self) -> int:
        """How many blocks are held by sequences."""
        return self.total - self.free

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks `tokens` tokens fill."""
        return -(-tokens // self.block_size)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the cached blocks of the longest known prefix; they are not taken yet."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def idle_among(self, blocks: Iterable[int]) -> int:
        """Return how many of these blocks nobody holds, so taking them lowers `free`."""
        return sum(1 for block in blocks if self._refs[block] == 0)

    def share(self, blocks: Iterable[int]) -> None:
        """Take part in blocks that `find` returned."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached_free[block]
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Return `count` blocks of unknown content. The caller made sure that `free` suffices."""
        if count > self.free:
            raise ValueError(f"{count} blocks wanted, {self.free} free")
        return [self._take() for _ in range(count)]

    def lend(self, count: int) -> list[int]:
        """Return `count` free blocks to be written to before the next `allocate`; they stay free.

        What the prefix cache holds in them is forgotten, the least recently used first. The caller
        made sure that `free` suffices.
        """
        if count > self.free:
            raise ValueError(f"{count} blocks wanted, {self.free} free")
        while len(self._blank) < count:
            self._blank.append(self._evict())
        return self._blank[len(self._blank) - count :]

    def remember(self, block: int, block_hash: bytes) -> None:
        """Let later sequences find this full, computed block. The first of equal blocks stays."""
        if self._caching and block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def release(self, blocks: Sequence[int]) -> None:
        """Give back a sequence's blocks, in the sequence's order."""
        # Last first: a long prompt's tail is evicted before the beginning others may share.
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            if block in self._hash_of:
                self._cached_free[block] = None
            else:
                self._blank.append(block)

    def forget_all(self) -> None:
        """Empty the prefix cache; blocks in use stay in use."""
        self._hash_of.clear()
        self._block_of.clear()
        self._blank.extend(self._cached_free)
        self._cached_free.clear()

    def check(self) -> None:
        """Raise AssertionError with every count if a block is lost, doubled or half cached."""
        held = {block for block, refs in enumerate(self._refs) if refs > 0}
        free = [*self._blank, *self._cached_free]
        counts = f"total {self.total}, held {len(held)}, free {len(free)}"
        assert min(self._refs) >= 0, f"a reference count is negative: {counts}"
        assert len(set(free)) == len(free), f"a block is free twice: {counts}"
        assert not held & set(free), f"a held block is free: {counts}"
        assert len(held) + len(free) == self.total, f"blocks are lost: {counts}"
        assert {b: h for h, b in self._block_of.items()} == self._hash_of, (
            f"hashes differ: {counts}"
        )
        assert NULL_BLOCK not in held and NULL_BLOCK not in free, f"block 0 was given out: {counts}"

    def _take(self) -> int:
        block = self._blank.pop() if self._blank else self._evict()
        self._refs[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._cached_free.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block
