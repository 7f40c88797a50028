"""Who holds what: heads in whole KV groups, everything exactly once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mizzen.runtime.errors import TensorParallelInvalidError
from mizzen.runtime.parallel.shard import HeadShard, Span, even_span, head_shard

HEADS = {
    "one rank holds all": (9, 3, 1, [((0, 9), (0, 3))]),
    "KV heads that do not divide go 1 and 2": (9, 3, 2, [((0, 3), (0, 1)), ((3, 6), (1, 2))]),
    "one KV head each": (9, 3, 3, [((0, 3), (0, 1)), ((3, 3), (1, 1)), ((6, 3), (2, 1))]),
    "a KV head on two ranks": (8, 1, 2, [((0, 4), (0, 1)), ((4, 4), (0, 1))]),
    "a KV head on two ranks, its queries uneven": (
        6,
        2,
        4,
        [((0, 1), (0, 1)), ((1, 2), (0, 1)), ((3, 1), (1, 1)), ((4, 2), (1, 1))],
    ),
}


@pytest.mark.parametrize(("heads", "kv_heads", "size", "expected"), HEADS.values(), ids=HEADS)
def test_heads(
    heads: int, kv_heads: int, size: int, expected: list[tuple[tuple[int, int], ...]]
) -> None:
    found = [head_shard(heads=heads, kv_heads=kv_heads, rank=r, size=size) for r in range(size)]
    assert found == [HeadShard(Span(*queries), Span(*kv)) for queries, kv in expected]


REFUSED = {"two KV heads on three ranks": (8, 2, 3), "more ranks than query heads": (2, 1, 4)}


@pytest.mark.parametrize(("heads", "kv_heads", "size"), REFUSED.values(), ids=REFUSED)
def test_impossible_spreads_are_refused(heads: int, kv_heads: int, size: int) -> None:
    with pytest.raises(
        TensorParallelInvalidError, match=r"Set spec\.parallelism\.tensor to at most"
    ):
        head_shard(heads=heads, kv_heads=kv_heads, rank=0, size=size)


@given(total=st.integers(0, 500), size=st.integers(1, 16))
def test_even_spans_cover_everything_once(total: int, size: int) -> None:
    spans = [even_span(total, rank=rank, size=size) for rank in range(size)]
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(total))
    assert max(s.size for s in spans) - min(s.size for s in spans) <= 1


@given(kv_heads=st.integers(1, 8), group=st.integers(1, 8), size=st.integers(1, 16))
def test_every_query_head_reads_its_own_kv_head(kv_heads: int, group: int, size: int) -> None:
    heads = kv_heads * group
    if size > kv_heads and (size % kv_heads or size > heads):
        return
    seen = []
    for rank in range(size):
        shard = head_shard(heads=heads, kv_heads=kv_heads, rank=rank, size=size)
        assert shard.queries.size == shard.group * shard.kv.size > 0
        for i in range(shard.queries.size):
            head = shard.queries.start + i
            assert shard.kv.start + i // shard.group == head // group
            seen.append(head)
    assert seen == list(range(heads))
