"""Attention over pages equals dense attention, however the pages lie and the step is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mizzen.runtime.attention.base import AttentionBias, KvShape, PagedBatch, alibi_slopes
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.attention.paged_cpu import PagedCpu
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


def dense(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias) -> Tensor:
    """Attention as its definition says it, one score at a time."""
    count, heads, head_dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,chd->hqc", q, k) * head_dim**-0.5
    at = torch.arange(count)
    distance = at[:, None] - at
    if bias.slopes_H is not None:
        scores -= bias.slopes_H[:, None, None] * distance
    is_hidden = (distance < 0) | (distance >= (bias.window or count))
    return torch.einsum("hqc,chd->qhd", scores.masked_fill(is_hidden, -torch.inf).softmax(-1), v)


def test_slopes_of_no_power_of_two_are_blooms() -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor  # noqa: PLC0415

    for heads in (1, 3, 7, 8, 12, 112):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(alibi_slopes(heads), theirs)


@pytest.mark.parametrize("window", [None, 300])
def test_long_biased_prompts_are_attended_in_pieces(window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(700, heads, HEAD_DIM) for heads in (4, 2, 2))
    bias = AttentionBias(alibi_slopes(4), window)
    found = CausalAttention([700])(0, q, k, v, bias=bias)
    torch.testing.assert_close(found, dense(q, k, v, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", [PagedSdpa, PagedCpu])
@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    lens=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (6, 1)]),
    window=st.sampled_from([None, None, 1, 7, 16, 50]),
    has_slopes=st.booleans(),
)
def test_paged_attention_equals_dense(
    attention: type[PagedSdpa] | type[PagedCpu],
    data: st.DataObject,
    lens: list[int],
    heads: tuple[int, int],
    window: int | None,
    has_slopes: bool,
) -> None:
    torch.manual_seed(sum(lens))
    q_heads, kv_heads = heads
    bias = AttentionBias(alibi_slopes(q_heads) if has_slopes else None, window)
    q = [torch.randn(n, q_heads, HEAD_DIM) for n in lens]
    k = [torch.randn(n, kv_heads, HEAD_DIM) for n in lens]
    v = [torch.randn(n, kv_heads, HEAD_DIM) for n in lens]
    expected = [dense(*qkv, bias) for qkv in zip(q, k, v, strict=True)]
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
        out = attention(cache, batch)(1, *packed, bias=bias)
        for i, part in zip(who, out.split([step[i] for i in who]), strict=True):
            found[i].append(part)
            done[i] += step[i]
    for i, want in enumerate(expected):
        torch.testing.assert_close(torch.cat(found[i]), want, atol=1e-5, rtol=1e-5)
    assert not cache[:, 0].any(), "layer 0 must stay untouched when layer 1 is written"
