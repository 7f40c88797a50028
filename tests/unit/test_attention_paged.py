"""Attention over pages equals dense attention, however the pages lie and the step is cut."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mizzen.runtime.attention.base import KvShape, PagedBatch
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.attention.sdpa import PagedSdpa

HEAD_DIM = 8


def split_into_steps(data: st.DataObject, lens: list[int]) -> list[list[int]]:
    """Draw how many new tokens of each sequence every step takes, until all are taken."""
    left, steps = list(lens), []
    while any(left):
        step = [data.draw(st.integers(0, min(n, 40))) for n in left]
        if not any(step):
            step[next(i for i, n in enumerate(left) if n)] = 1
        steps.append(step)
        left = [n - taken for n, taken in zip(left, step, strict=True)]
    return steps


def scattered_tables(lens: list[int], blocks: int) -> list[list[int]]:
    free = (torch.randperm(blocks - 1) + 1).tolist()
    return [[free.pop() for _ in range(-(-n // 16))] for n in lens]


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    lens=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (6, 1)]),
)
def test_paged_attention_equals_dense(
    data: st.DataObject, lens: list[int], heads: tuple[int, int]
) -> None:
    torch.manual_seed(sum(lens))
    q_heads, kv_heads = heads
    q = [torch.randn(n, q_heads, HEAD_DIM) for n in lens]
    k = [torch.randn(n, kv_heads, HEAD_DIM) for n in lens]
    v = [torch.randn(n, kv_heads, HEAD_DIM) for n in lens]
    expected = CausalAttention(lens)(0, torch.cat(q), torch.cat(k), torch.cat(v)).split(lens)
    cache = KvShape(2, 40, kv_heads, HEAD_DIM).allocate(dtype=torch.float32)
    tables = scattered_tables(lens, 40)
    done = [0] * len(lens)
    found: list[list[Tensor]] = [[] for _ in lens]
    for step in split_into_steps(data, lens):
        who = [i for i, taken in enumerate(step) if taken]
        spans = {i: slice(done[i], done[i] + step[i]) for i in who}
        batch = PagedBatch.build(
            query_lens=[step[i] for i in who],
            context_lens=[spans[i].stop for i in who],
            block_tables=[tables[i] for i in who],
        )
        packed = (torch.cat([x[i][spans[i]] for i in who]) for x in (q, k, v))
        out = PagedSdpa(cache, batch)(1, *packed)
        for i, part in zip(who, out.split([step[i] for i in who]), strict=True):
            found[i].append(part)
            done[i] += step[i]
    for i, want in enumerate(expected):
        torch.testing.assert_close(torch.cat(found[i]), want, atol=1e-5, rtol=1e-5)
    assert not cache[:, 0].any(), "layer 0 must stay untouched when layer 1 is written"
