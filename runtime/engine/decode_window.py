"""A dense copy of the decoding sequences' KV, beside the paged cache: for the CPU.

Gathering pages anew in every layer of every step costs a CPU more than the attention itself. Here
a sequence's pages are gathered once, when it begins to decode; each step then adds one token and
attends by two plain matrix products. The pages stay the truth: they are written too, and a
sequence whose copy is missing or behind is gathered again.
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
        self._sides: list[list[Tensor]] = []  # [layer][key or value], each R K C d
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
        return WindowAttend(self._cache, self._sides, batch, rows)

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
            for sides in self._sides:
                for side_RKCd in sides:
                    side_RKCd[gap] = side_RKCd[row]
            self._row_of[key] = gap

    def _fit(self, length: int) -> None:
        """Make rows hold `length` tokens, and not twice as many."""
        capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        if capacity <= self._capacity <= 2 * capacity:
            return
        old, used = self._sides, len(self._row_of)
        kept = min(capacity, self._capacity)
        self._sides = []
        for layer in range(self._layers):
            # Zeros, because what is masked out is still multiplied, and NaN would survive that.
            shape = (self._max_rows, self._kv_heads, capacity, self._head_dim)
            sides = [zeros_when_touched(shape, self._cache.dtype) for _ in range(2)]
            for side, old_side in zip(sides, old[layer] if old else (), strict=False):
                side[:used, :, :kept] = old_side[:used, :, :kept]
            self._sides.append(sides)
        self._capacity = capacity

    def _fill(self, sequence_id: int, length: int, blocks_B: Tensor) -> None:
        row = self._row_of.setdefault(sequence_id, len(self._row_of))
        block_tokens = self._cache.shape[3]
        blocks_B = blocks_B[: -(-length // block_tokens)]
        for layer, sides in enumerate(self._sides):
            for which, side_RKCd in enumerate(sides):
                pages = self._cache[which, layer].index_select(0, blocks_B).flatten(0, 1)
                side_RKCd[row, :, :length] = pages[:length].transpose(0, 1)


class WindowAttend:
    """An `Attend` for one step: decodes over the window, prompts over pages."""

    def __init__(
        self, cache: Tensor, sides: list[list[Tensor]], batch: PagedBatch, rows: list[int]
    ) -> None:
        self._cache = cache
        self._sides = sides
        self._count = len(rows)
        self._slots_S = batch.slots_T[: self._count]
        lens_S = torch.tensor(batch.context_lens[: self._count])
        rows_S = torch.tensor(rows)
        self._in_order = rows == list(range(len(rows)))
        self._rows_S = rows_S
        self._order_R = rows_S.argsort()
        kv_heads, self._capacity = sides[0][0].shape[1:3]
        heads_K = torch.arange(kv_heads)
        self._at = ((rows_S[:, None] * kv_heads + heads_K) * self._capacity).add_(
            lens_S[:, None] - 1
        ).flatten()  # fmt: skip
        self._length = int(lens_S[0]) if self._count == 1 else 0
        self._bias = self._mask(lens_S[self._order_R], kv_heads)
        self._prompts = _prompts(cache, batch, self._count)

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """Return each query's mixture over its sequence's context, itself included."""
        count, head_dim = self._count, q_THd.shape[-1]
        for which, new_TKd in enumerate((k_TKd, v_TKd)):
            new_SKd = new_TKd[:count]
            self._cache[which, layer].flatten(0, 1).index_copy_(0, self._slots_S, new_SKd)
            side_RKCd = self._sides[layer][which]
            side_RKCd.view(-1, head_dim).index_copy_(0, self._at, new_SKd.reshape(-1, head_dim))
        if self._prompts is None:
            return self._decode(layer, q_THd)
        rest = [x[count:] for x in (q_THd, k_TKd, v_TKd)]
        return torch.cat((self._decode(layer, q_THd[:count]), self._prompts(layer, *rest)))

    def _decode(self, layer: int, q_SHd: Tensor) -> Tensor:
        count, heads, head_dim = q_SHd.shape
        keys, values = (side[:count] for side in self._sides[layer])
        kv_heads = keys.shape[1]
        if count == 1:
            keys, values = keys[:, :, : self._length], values[:, :, : self._length]
            q_1KGd = q_SHd.reshape(1, kv_heads, -1, head_dim)
            return F.scaled_dot_product_attention(q_1KGd, keys, values).reshape(q_SHd.shape)
        if not self._in_order:
            q_SHd = q_SHd.index_select(0, self._order_R)
        # A KV group's query heads stand side by side: each key is read once for all of them.
        q = (q_SHd * head_dim**-0.5).reshape(count * kv_heads, heads // kv_heads, head_dim)
        scores = torch.bmm(q, keys.flatten(0, 1).transpose(1, 2)).add_(self._bias)
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
