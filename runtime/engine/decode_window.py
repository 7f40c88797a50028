"""A dense copy of the decoding sequences' KV, beside the paged cache: for the CPU.

Gathering pages anew in every layer of every step costs a CPU more than the attention itself. Here
a sequence's pages are gathered once, when it begins to decode; each step then adds one token and
attends by two plain matrix products. The pages stay the truth: when a step ends its new tokens are
copied there, for all layers at once, and a sequence whose copy is missing or behind is gathered
again.
"""

# Shapes: S decoding sequences (first in the packed batch), R rows of the window, C tokens of
# capacity, K KV heads and G query heads per KV head of this rank, d head dimension.
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.attention.base import PagedBatch
from mizzen.runtime.attention.sdpa import PagedSdpa
from mizzen.runtime.engine.memory import zeros_when_touched

# Capacity grows by this much. It is never sliced: a strided batch makes the products copy it.
CAPACITY_STEP = 64
# One long context would pad all others to its length; beyond this share of padding, pages win.
MAX_PADDED_RATIO = 2.0


class DecodeWindow:
    """Rows of contiguous keys and values, one per decoding sequence."""

    def __init__(self, cache: Tensor, *, max_rows: int, max_bytes: int) -> None:
        self._cache = cache
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        _, self._layers, _, _, self._kv_heads, self._head_dim = cache.shape
        self._capacity = 0
        self._data = cache.new_empty(0)  # [key or value, layer, R, K, C, d]
        self._row_of: dict[int, int] = {}
        self._len_of: dict[int, int] = {}

    def attend(self, batch: PagedBatch, sequence_ids: Sequence[int]) -> "WindowAttend | PagedSdpa":
        """Return attention for a step whose single-query sequences come first.

        Falls back to pages alone where a window would be too large or mostly padding.
        """
        count = sum(1 for query_len in batch.query_lens if query_len == 1)
        ids, lens = sequence_ids[:count], batch.context_lens[:count]
        if not count or not self._is_worthwhile(lens):
            self._forget(keep=())
            return PagedSdpa(self._cache, batch)
        self._forget(keep=ids)
        self._fit(max(lens))
        for index, (sequence_id, length) in enumerate(zip(ids, lens, strict=True)):
            if self._len_of.get(sequence_id) != length - 1:
                self._fill(sequence_id, length - 1, batch.block_tables_SB[index])
            self._len_of[sequence_id] = length
        rows = [self._row_of[sequence_id] for sequence_id in ids]
        return WindowAttend(self._cache, self._data, batch, rows)

    def _is_worthwhile(self, lens: Sequence[int]) -> bool:
        capacity = -(-max(lens) // CAPACITY_STEP) * CAPACITY_STEP
        token_bytes = 2 * self._layers * self._kv_heads * self._head_dim * self._cache.itemsize
        padded = len(lens) * capacity
        slack = len(lens) * CAPACITY_STEP
        return (
            len(lens) <= self._max_rows
            and padded * token_bytes <= self._max_bytes
            and padded <= MAX_PADDED_RATIO * sum(lens) + slack
        )

    def _forget(self, *, keep: Sequence[int]) -> None:
        """Drop the sequences that no longer decode, and close the gaps they leave."""
        kept = set(keep)
        free = sorted(row for key, row in self._row_of.items() if key not in kept)
        for key in [key for key in self._row_of if key not in kept]:
            del self._row_of[key], self._len_of[key]
        if not free:
            return
        count = len(self._row_of)
        gaps = [row for row in free if row < count]
        beyond = [(key, row) for key, row in self._row_of.items() if row >= count]
        for (key, row), gap in zip(beyond, gaps, strict=True):
            self._data[:, :, gap] = self._data[:, :, row]
            self._row_of[key] = gap

    def _fit(self, length: int) -> None:
        """Make rows hold `length` tokens, and not twice as many."""
        capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        if capacity <= self._capacity <= 2 * capacity:
            return
        old, used = self._data, len(self._row_of)
        # Zeros, because what is masked out is still multiplied, and NaN would survive that.
        shape = (2, self._layers, self._max_rows, self._kv_heads, capacity, self._head_dim)
        self._data = zeros_when_touched(shape, self._cache.dtype)
        if used:
            kept = min(capacity, self._capacity)
            self._data[:, :, :used, :, :kept] = old[:, :, :used, :, :kept]
        self._capacity = capacity

    def _fill(self, sequence_id: int, length: int, blocks_B: Tensor) -> None:
        row = self._row_of.setdefault(sequence_id, len(self._row_of))
        block_tokens = self._cache.shape[3]
        blocks_B = blocks_B[: -(-length // block_tokens)]
        for which in range(2):
            for layer in range(self._layers):
                pages = self._cache[which, layer].index_select(0, blocks_B).flatten(0, 1)
                self._data[which, layer, row, :, :length] = pages[:length].transpose(0, 1)


class WindowAttend:
    """An `Attend` for one step: decodes over the window, prompts over pages."""

    def __init__(self, cache: Tensor, data: Tensor, batch: PagedBatch, rows: list[int]) -> None:
        self._cache = cache
        self._count = count = len(rows)
        _, self._layers, max_rows, kv_heads, self._capacity, self._head_dim = data.shape
        self._data = data
        self._flat = data.view(2, self._layers, max_rows * kv_heads * self._capacity, -1)
        self._slots_S = batch.slots_T[:count]
        rows_S, lens_S = torch.tensor(rows), torch.tensor(batch.context_lens[:count])
        self._in_order = rows == list(range(count))
        self._rows_S, self._order_R = rows_S, rows_S.argsort()
        first_SK = (rows_S[:, None] * kv_heads + torch.arange(kv_heads)) * self._capacity
        self._at = (first_SK + lens_S[:, None] - 1).flatten()
        self._length = batch.context_lens[0]
        self._bias = self._mask(lens_S[self._order_R], kv_heads)
        self._prompts = _prompts(cache, batch, count)

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """Return each query's mixture over its sequence's context, itself included."""
        count = self._count
        for which, new_TKd in enumerate((k_TKd, v_TKd)):
            new = new_TKd[:count].reshape(-1, self._head_dim)
            self._flat[which, layer].index_copy_(0, self._at, new)
        if self._prompts is None:
            return self._decode(layer, q_THd)
        rest = [x[count:] for x in (q_THd, k_TKd, v_TKd)]
        return torch.cat((self._decode(layer, q_THd[:count]), self._prompts(layer, *rest)))

    def finish(self) -> None:
        """Copy the step's new keys and values to the pages, for all layers in one go.

        A copy in each layer would be the same bytes in many small operations, and a small step's
        time is mostly the number of its operations.
        """
        sides, kv_heads = 2 * self._layers, self._data.shape[3]
        new = self._flat.flatten(0, 1).index_select(1, self._at)
        pages = self._cache.view(sides, -1, kv_heads, self._head_dim)
        pages.index_copy_(1, self._slots_S, new.view(sides, self._count, kv_heads, -1))

    def _decode(self, layer: int, q_SHd: Tensor) -> Tensor:
        count, heads, head_dim = q_SHd.shape
        keys, values = self._data[0, layer, :count], self._data[1, layer, :count]
        kv_heads = keys.shape[1]
        if count == 1:
            keys, values = keys[:, :, : self._length], values[:, :, : self._length]
            q_1KGd = q_SHd.reshape(1, kv_heads, -1, head_dim)
            return F.scaled_dot_product_attention(q_1KGd, keys, values).reshape(q_SHd.shape)
        if not self._in_order:
            q_SHd = q_SHd.index_select(0, self._order_R)
        # A KV group's query heads stand side by side: each key is read once for all of them.
        q = q_SHd.reshape(count * kv_heads, heads // kv_heads, head_dim)
        keys_T = keys.flatten(0, 1).transpose(1, 2)
        scores = torch.baddbmm(self._bias, q, keys_T, alpha=head_dim**-0.5)
        out = torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(count, heads, head_dim)
        return out if self._in_order else out.index_select(0, self._rows_S)

    def _mask(self, lens_R: Tensor, kv_heads: int) -> Tensor:
        is_beyond_RC = torch.arange(self._capacity) >= lens_R[:, None]
        bias_RC = torch.zeros(is_beyond_RC.shape, dtype=self._cache.dtype)
        bias_RC.masked_fill_(is_beyond_RC, -torch.inf)
        return bias_RC.repeat_interleave(kv_heads, 0)[:, None]


def _prompts(cache: Tensor, batch: PagedBatch, count: int) -> PagedSdpa | None:
    if count == len(batch.query_lens):
        return None
    return PagedSdpa(
        cache,
        PagedBatch(
            query_lens=batch.query_lens[count:],
            context_lens=batch.context_lens[count:],
            block_tables_SB=batch.block_tables_SB[count:],
            slots_T=batch.slots_T[count:],
        ),
    )
