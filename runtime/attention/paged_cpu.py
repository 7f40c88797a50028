"""Paged attention on a CPU: our kernel reads the pages where they lie.

Gathering pages so that torch can attend costs a CPU more than the attention itself.
"""

# Shapes: T packed tokens, S sequences with one query, P with several, H query heads, K KV heads, d
# head dimension.
from ctypes import byref

import torch
from torch import Tensor

from mizzen.runtime.attention.base import NO_BIAS, AttentionBias, PagedBatch
from mizzen.runtime.kernels import library
from mizzen.runtime.kernels.library import TYPES, Attention


class PagedCpu:
    """An `Attend` for one step: stores new keys and values in the cache and attends over it."""

    def __init__(self, cache: Tensor, batch: PagedBatch) -> None:
        kernels = library.kernels()
        assert kernels is not None, "who chooses this has asked for it"
        self._kernel = kernels.paged_attention
        self._cache = cache
        _, _, _, page, kv_heads, dim = cache.shape
        # The kernel is given their addresses, so they must live as long as this does.
        self._decodes_S3, self._prompts_P4 = _plan(batch)
        self._batch = batch
        self._tables = batch.block_tables_SB.contiguous()
        self._arguments = Attention(
            slots=batch.slots_T.data_ptr(),
            tables=self._tables.data_ptr(),
            decodes=self._decodes_S3.data_ptr(),
            prompts=self._prompts_P4.data_ptr(),
            tokens=len(batch.slots_T),
            count=len(self._decodes_S3),
            prompt_count=len(self._prompts_P4),
            table_width=self._tables.shape[1],
            kv_heads=kv_heads,
            dim=dim,
            page=page,
            scale=dim**-0.5,
            type=TYPES[cache.dtype],
        )

    def plan(self, heads: int) -> tuple[Attention, int]:
        """Return the arguments that all layers share, and the bytes between two layers' caches."""
        call = Attention.from_buffer_copy(self._arguments)
        call.keys, call.values = self._cache[0].data_ptr(), self._cache[1].data_ptr()
        call.heads = heads
        return call, self._cache.stride(1) * self._cache.element_size()

    def __call__(
        self,
        layer: int,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        *,
        bias: AttentionBias = NO_BIAS,
    ) -> Tensor:
        """Return each query's mixture over its sequence's context, itself included."""
        q_THd, k_TKd, v_TKd = (_rows(x) for x in (q_THd, k_TKd, v_TKd))
        if k_TKd.stride(0) != v_TKd.stride(0):
            k_TKd, v_TKd = k_TKd.contiguous(), v_TKd.contiguous()
        keys, values = self._cache[0, layer], self._cache[1, layer]
        out_THd = torch.empty(q_THd.shape, dtype=q_THd.dtype)
        call = self._arguments
        call.q, call.k, call.v = q_THd.data_ptr(), k_TKd.data_ptr(), v_TKd.data_ptr()
        call.keys, call.values, call.out = keys.data_ptr(), values.data_ptr(), out_THd.data_ptr()
        call.q_stride, call.kv_stride, call.heads = q_THd.stride(0), k_TKd.stride(0), q_THd.shape[1]
        call.slopes = None if bias.slopes_H is None else bias.slopes_H.data_ptr()
        call.window = bias.window or 0
        self._kernel(byref(call), torch.get_num_threads())
        return out_THd


def _rows(x: Tensor) -> Tensor:
    """Return `x` with each token's heads side by side, as the kernel reads them."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _plan(batch: PagedBatch) -> tuple[Tensor, Tensor]:
    """Return each (first) query's token, its sequence, how many keys it sees, how many there are.

    The last is left out where it is one.
    """
    decodes, prompts, token = [], [], 0
    for index, (query_len, context_len) in enumerate(
        zip(batch.query_lens, batch.context_lens, strict=True)
    ):
        if query_len == 1:
            decodes.append((token, index, context_len))
        elif query_len:
            prompts.append((token, index, context_len - query_len + 1, query_len))
        token += query_len
    return (
        torch.tensor(decodes, dtype=torch.int64).view(-1, 3),
        torch.tensor(prompts, dtype=torch.int64).view(-1, 4),
    )
