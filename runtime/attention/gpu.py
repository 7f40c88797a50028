"""Which attention a GPU's steps use: what the device, the model and the installed torch allow."""

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mizzen.runtime.attention.base import PagedBatch
from mizzen.runtime.attention.triton_paged import PagedTriton
from mizzen.runtime.attention.varlen import VarlenPrompts

_AMPERE = (8, 0)


def gpu_attention(cache: Tensor, batch: PagedBatch) -> PagedTriton | VarlenPrompts:
    """Return an `Attend` for one step over this cache, which lies on a GPU."""
    is_better = takes_prompts(
        capability=_capability(cache.device),
        dtype=cache.dtype,
        head_dim=cache.shape[-1],
        has_varlen=has_varlen(),
    )
    return VarlenPrompts(cache, batch) if is_better else PagedTriton(cache, batch)


def takes_prompts(
    *, capability: tuple[int, int], dtype: torch.dtype, head_dim: int, has_varlen: bool
) -> bool:
    """Return whether torch's own kernel can attend whole prompts; it is faster at that than ours.

    FlashAttention-2 is inside: two number formats, heads of up to 256 dimensions in steps of eight.
    """
    is_half = dtype in (torch.float16, torch.bfloat16)
    fits = is_half and head_dim <= 256 and head_dim % 8 == 0
    return has_varlen and capability >= _AMPERE and fits


@lru_cache
def has_varlen() -> bool:
    """Return whether the installed torch has variable-length attention."""
    return find_spec("torch.nn.attention.varlen") is not None


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
