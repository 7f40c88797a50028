"""The Triton kernel computes what the CPU's paged attention does. Interpreted: no GPU is needed."""

import pytest
import torch
from torch import Tensor

from mizzen.runtime.attention.base import AttentionBias, KvShape, PagedBatch, alibi_slopes
from mizzen.runtime.attention.sdpa import PagedSdpa
from mizzen.runtime.attention.triton_paged import PagedTriton, _attend

# Per sequence, new tokens and all tokens.
PREFILL = [(5, 5), (37, 37)]
MIXED = [(1, 40), (19, 70), (1, 1), (7, 33)]
LONG = [(1, 30), (70, 90)]  # computed in larger pieces
DECODE = [(1, 97), (1, 16), (1, 17)]
CASES: dict[str, tuple[list[tuple[int, int]], int, int, int, AttentionBias]] = {
    "prompts": (PREFILL, 4, 4, 16, AttentionBias()),
    "decodes": (DECODE, 4, 2, 64, AttentionBias()),
    "both in a step, nine heads over three": (MIXED, 9, 3, 24, AttentionBias()),
    "ALiBi on heads that are no power of two": (MIXED, 7, 7, 16, AttentionBias(alibi_slopes(7))),
    "a sliding window": (MIXED, 4, 1, 16, AttentionBias(None, 11)),
    "a window of one": (DECODE, 2, 2, 16, AttentionBias(None, 1)),
    "a window and ALiBi": (MIXED, 6, 2, 16, AttentionBias(alibi_slopes(6), 21)),
    "head size 256": (MIXED, 2, 1, 256, AttentionBias()),
    "more query heads per KV head than a program's least": (DECODE, 20, 1, 16, AttentionBias()),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut contexts into two to four parts: interpreted, sixteen take long."""
    monkeypatch.setattr("mizzen.runtime.attention.triton_paged._ENOUGH_PROGRAMS", 24)


def test_the_kernel_is_interpreted() -> None:
    assert type(_attend).__name__ == "InterpretedFunction"


def attend_both(
    lens: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    bias: AttentionBias,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the kernel's output and the reference's, on the same scattered pages."""
    torch.manual_seed(0)
    free = (torch.randperm(39) + 1).tolist()
    batch = PagedBatch.build(
        query_lens=[query_len for query_len, _ in lens],
        context_lens=[context_len for _, context_len in lens],
        block_tables=[[free.pop() for _ in range(-(-n // 16))] for _, n in lens],
    )
    cache = KvShape(2, 40, kv_heads, head_dim).allocate(dtype=dtype).normal_()
    tokens = len(batch.slots_T)
    q, k, v = (torch.randn(tokens, n, head_dim).to(dtype) for n in (heads, kv_heads, kv_heads))
    expected = PagedSdpa(theirs := cache.clone(), batch)(1, q, k, v, bias=bias)
    found = PagedTriton(cache, batch)(1, q, k, v, bias=bias)
    assert torch.equal(cache, theirs), "both store the same keys and values"
    return found, expected


@pytest.mark.parametrize(
    ("lens", "heads", "kv_heads", "head_dim", "bias"), CASES.values(), ids=CASES
)
def test_it_equals_the_reference(
    lens: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, bias: AttentionBias
) -> None:
    found, expected = attend_both(lens, heads, kv_heads, head_dim, bias, torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("programs", [1, 150], ids=["in one part", "in many parts"])
def test_the_number_of_parts_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    monkeypatch.setattr("mizzen.runtime.attention.triton_paged._ENOUGH_PROGRAMS", programs)
    bias = AttentionBias(alibi_slopes(4), 50)
    found, expected = attend_both(MIXED, 4, 2, 16, bias, torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("lens", "heads", "kv_heads", "head_dim", "bias"),
    [
        (MIXED, 4, 2, 64, AttentionBias()),
        (LONG, 6, 2, 16, AttentionBias(None, 40)),
        (LONG, 1, 1, 256, AttentionBias()),
    ],
    ids=["both in a step", "a long prompt, three heads over one", "a long prompt of wide heads"],
)
def test_half_precision_is_as_close_as_it_can_be(
    lens: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, bias: AttentionBias
) -> None:
    # The interpreter multiplies bfloat16 as if it were integers, so float16 stands in.
    found, expected = attend_both(lens, heads, kv_heads, head_dim, bias, torch.float16)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, expected, atol=0.003, rtol=0.003)
