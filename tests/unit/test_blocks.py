import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mizzen.runtime.engine.blocks import NULL_BLOCK, BlockPool, next_hash, root_hash

SIZE = 4


def chain(root: bytes, tokens: list[int]) -> list[bytes]:
    hashes: list[bytes] = []
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        parent = hashes[-1] if hashes else root
        hashes.append(next_hash(parent, tokens[start : start + SIZE]))
    return hashes


def pool_with(hashes: list[bytes], *, num_blocks: int = 8) -> tuple[BlockPool, list[int]]:
    pool = BlockPool(num_blocks=num_blocks, block_size=SIZE)
    blocks = pool.allocate(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.remember(block, block_hash)
    return pool, blocks


PLAIN = root_hash(adapter_digest="", cache_salt="")
TOKENS = list(range(12))


def test_the_reserved_block_is_never_handed_out() -> None:
    pool = BlockPool(num_blocks=5, block_size=SIZE)
    assert NULL_BLOCK not in pool.allocate(4)
    with pytest.raises(ValueError, match="1 blocks wanted, 0 free"):
        pool.allocate(1)


def test_a_released_prefix_is_found_and_shared_again() -> None:
    hashes = chain(PLAIN, TOKENS)
    pool, blocks = pool_with(hashes)
    pool.release(blocks)
    assert pool.used == 0
    assert pool.find(hashes) == blocks
    pool.share(blocks)
    pool.share(blocks)
    assert pool.used == 3
    pool.release(blocks)
    assert pool.used == 3
    pool.check()


def test_only_the_common_beginning_is_found() -> None:
    pool, blocks = pool_with(chain(PLAIN, TOKENS))
    assert pool.find(chain(PLAIN, [*TOKENS[:8], 99, 9, 10, 11])) == blocks[:2]
    assert pool.find(chain(PLAIN, [99, *TOKENS[1:]])) == []


OTHER_ROOTS = {
    "another adapter": root_hash(adapter_digest="sha256:aa", cache_salt=""),
    "new weights under the same adapter name": root_hash(adapter_digest="sha256:bb", cache_salt=""),
    "another tenant's salt": root_hash(adapter_digest="", cache_salt="tenant"),
    "a salt that spells an adapter": root_hash(adapter_digest="", cache_salt="sha256:aa"),
    "a salt that spells the separator": root_hash(adapter_digest="", cache_salt="|salt:0:"),
}


@pytest.mark.parametrize("root", OTHER_ROOTS.values(), ids=OTHER_ROOTS)
def test_a_prefix_is_not_shared_with(root: bytes) -> None:
    pool, _ = pool_with(chain(PLAIN, TOKENS))
    assert pool.find(chain(root, TOKENS)) == []
    assert len({PLAIN, *OTHER_ROOTS.values()}) == len(OTHER_ROOTS) + 1


def test_uncached_blocks_are_reused_before_cached_ones_and_tails_before_heads() -> None:
    hashes = chain(PLAIN, TOKENS)
    pool, blocks = pool_with(hashes, num_blocks=6)
    pool.release(blocks)
    pool.allocate(2)
    assert pool.find(hashes) == blocks
    pool.allocate(1)
    assert pool.find(hashes) == blocks[:2]


def test_lent_blocks_stay_free_and_are_no_more_found() -> None:
    hashes = chain(PLAIN, TOKENS)
    pool, blocks = pool_with(hashes, num_blocks=6)
    pool.release(blocks)
    blank = pool.lend(2)
    assert pool.find(hashes) == blocks
    assert set(pool.lend(3)) == {*blank, blocks[2]}
    assert pool.find(hashes) == blocks[:2]
    assert pool.used == 0
    pool.check()
    with pytest.raises(ValueError, match="6 blocks wanted, 5 free"):
        pool.lend(6)


def test_without_caching_nothing_is_found() -> None:
    hashes = chain(PLAIN, TOKENS)
    pool = BlockPool(num_blocks=8, block_size=SIZE, enable_caching=False)
    for block, block_hash in zip(pool.allocate(3), hashes, strict=True):
        pool.remember(block, block_hash)
    assert pool.find(hashes) == []


def test_forgetting_keeps_blocks_in_use() -> None:
    hashes = chain(PLAIN, TOKENS)
    pool, blocks = pool_with(hashes)
    pool.release(blocks[2:])
    pool.forget_all()
    assert pool.find(hashes) == []
    assert pool.used == 2
    pool.release(blocks[:2])
    pool.check()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_free_and_used_blocks_are_always_all_blocks(data: st.DataObject) -> None:
    pool = BlockPool(num_blocks=9, block_size=SIZE)
    held: list[list[int]] = []
    for _ in range(data.draw(st.integers(0, 40))):
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=SIZE, max_size=4 * SIZE))
        hashes = chain(PLAIN, prompt)
        shared = pool.find(hashes)
        fresh = len(hashes) - len(shared)
        if fresh + pool.idle_among(shared) <= pool.free:
            pool.share(shared)
            blocks = shared + pool.allocate(fresh)
            for block, block_hash in zip(blocks, hashes, strict=True):
                pool.remember(block, block_hash)
            held.append(blocks)
        if held and data.draw(st.booleans()):
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        pool.check()
        assert pool.used == len({block for blocks in held for block in blocks})
    for blocks in held:
        pool.release(blocks)
    assert pool.used == 0
