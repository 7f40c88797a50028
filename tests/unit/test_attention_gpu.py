"""Who attends prompts on a GPU, and that those torch attends come back in their places."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mizzen.runtime.attention.base import AttentionBias, KvShape, PagedBatch
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.attention.gpu import has_varlen, takes_prompts
from mizzen.runtime.attention.sdpa import PagedSdpa
from mizzen.runtime.attention.varlen import VarlenPrompts

H100, TURING = (9, 0), (7, 5)
CHOICES = {
    "torch's kernel takes whole prompts": (H100, torch.bfloat16, 128, True, True),
    "an older torch has none": (H100, torch.bfloat16, 128, False, False),
    "it knows no float32": (H100, torch.float32, 128, True, False),
    "nor heads beyond 256": (H100, torch.float16, 320, True, False),
    "nor those between eights": (H100, torch.float16, 60, True, False),
    "nor older devices": (TURING, torch.float16, 64, True, False),
    "GPT-J's heads are its largest": (H100, torch.float16, 256, True, True),
}


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "has_varlen", "expected"), CHOICES.values(), ids=CHOICES
)
def test_who_attends_whole_prompts(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, has_varlen: bool, expected: bool
) -> None:
    found = takes_prompts(
        capability=capability, dtype=dtype, head_dim=head_dim, has_varlen=has_varlen
    )
    assert found == expected


def test_the_installed_torch_has_it() -> None:
    assert has_varlen()


def varlen_on_a_cpu(prompts: list[list[int]]) -> Callable[..., Tensor]:
    """Return what torch's documentation says of its kernel, which knows no CPU."""

    def varlen_attn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ends_q: Tensor,
        ends_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        assert ends_q.dtype == ends_k.dtype == torch.int32
        assert window_size == (-1, 0), "causal"
        assert enable_gqa == (q.shape[1] != k.shape[1])
        lens = ends_q.diff().tolist()
        assert max_q == max_k == max(lens)
        prompts.append(lens)
        return CausalAttention(lens)(0, q, k, v)

    return varlen_attn


STEPS = {
    "prompts alone": ([(5, 5), (37, 37)], [5, 37]),
    "prompts between decodes, a later chunk and a first token": (
        [(1, 40), (1, 1), (19, 70), (21, 21), (7, 33), (3, 3)],
        [21, 3],
    ),
    "no whole prompt": ([(1, 40), (7, 33)], None),
}


@pytest.mark.parametrize(("lens", "given"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("bias", [AttentionBias(None, 11), None], ids=["window", "plain"])
def test_whole_prompts_go_to_torch_and_the_rest_to_pages(
    monkeypatch: pytest.MonkeyPatch,
    lens: list[tuple[int, int]],
    given: list[int] | None,
    bias: AttentionBias | None,
) -> None:
    prompts: list[list[int]] = []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_on_a_cpu(prompts))
    monkeypatch.setattr("mizzen.runtime.attention.triton_paged._ENOUGH_PROGRAMS", 4)
    torch.manual_seed(0)
    free = iter((torch.randperm(29) + 1).tolist())
    batch = PagedBatch.build(
        query_lens=[query_len for query_len, _ in lens],
        context_lens=[context_len for _, context_len in lens],
        block_tables=[[next(free) for _ in range(-(-n // 16))] for _, n in lens],
    )
    cache = KvShape(2, 30, 2, 16).allocate(dtype=torch.float32).normal_()
    theirs = cache.clone()
    tokens = len(batch.slots_T)
    q, k, v = (torch.randn(tokens, heads, 16) for heads in (4, 2, 2))
    options = {} if bias is None else {"bias": bias}
    expected = PagedSdpa(theirs, batch)(1, q, k, v, **options)
    found = VarlenPrompts(cache, batch)(1, q, k, v, **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(cache, theirs), "both store the same keys and values"
    assert prompts == ([given] if given and bias is None else [])
