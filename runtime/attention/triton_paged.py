"""Paged attention as one Triton kernel, for prompts, decodes and steps that mix them.

A program computes some queries of one sequence for one KV head, with all the query heads that read
it, so each key is read once per group. Where a step has too few programs to fill the device, each
context is cut into parts that are attended side by side and joined afterwards; how many depends on
the step's shape alone, never on a context's length, as captured graphs need it.

Source: online softmax, FlashAttention (Dao et al., 2022); splitting, Flash-Decoding (Dao et al.,
2023).
"""

# Neither triton's language nor torch's calls are typed.
# mypy: disable-error-code="import-untyped, no-any-return, no-untyped-call, no-untyped-def"
# mypy: disable-error-code="untyped-decorator"

# Shapes: T packed tokens, P pieces of queries, S sequences, B blocks, X parts of a context, H query
# heads and K KV heads of this rank, d head dimension. In the kernel: M rows (a query and a query
# head each), N keys, D the head dimension rounded up.
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from mizzen.runtime.attention.base import NO_BIAS, AttentionBias, PagedBatch

_ROWS = 16  # the least that tensor cores multiply
# A long prompt's keys are read once for this many rows; wider heads or numbers leave no registers.
_PROMPT_ROWS, _PROMPT_DIMS = 64, 128
_TILE = 32  # keys read at once: with 256 dimensions more would not stay in registers
_MAX_PARTS = 16
_ENOUGH_PROGRAMS = 256  # some for each of an H100's 132 processors


class PagedTriton:
    """An `Attend` for one step: stores new keys and values in the cache and attends over it."""

    def __init__(
        self, cache: Tensor, batch: PagedBatch, *, pieces_P4: Tensor | None = None
    ) -> None:
        """Attend over `pieces_P4` instead of what the batch's lengths say, if it is given.

        A captured graph's lengths change without the graph: they stand in its own buffer.
        """
        self._cache = cache
        self._batch = batch
        self._longest = max(batch.query_lens)
        self._given_P4 = pieces_P4
        self._pieces_of: dict[int, Tensor] = {}

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
        keys, values = (side[layer].flatten(0, 1) for side in self._cache)
        keys.index_copy_(0, self._batch.slots_T, k_TKd)
        values.index_copy_(0, self._batch.slots_T, v_TKd)
        (tokens, heads, head_dim), kv_heads = q_THd.shape, keys.shape[1]
        group = heads // kv_heads
        is_narrow = head_dim <= _PROMPT_DIMS and q_THd.itemsize == 2
        is_long = is_narrow and self._longest * group >= _PROMPT_ROWS
        rows = max(_PROMPT_ROWS if is_long else _ROWS, triton.next_power_of_2(group))
        pieces_P4 = self._pieces(rows // group) if self._given_P4 is None else self._given_P4
        programs = len(pieces_P4) * kv_heads
        parts = 1 if programs >= _ENOUGH_PROGRAMS else min(_MAX_PARTS, _ENOUGH_PROGRAMS // programs)
        out_XTHd = q_THd.new_empty((parts, tokens, heads, head_dim), dtype=torch.float32)
        weights_XTH = q_THd.new_empty((parts, tokens, heads), dtype=torch.float32)
        tables_SB = self._batch.block_tables_SB
        _attend[(len(pieces_P4), kv_heads, parts)](
            out_XTHd,
            weights_XTH,
            q_THd.contiguous(),
            keys,
            values,
            tables_SB,
            pieces_P4,
            bias.slopes_H,
            tokens,
            tables_SB.stride(0),
            head_dim**-0.5,
            HEADS=heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            DIMS=max(16, triton.next_power_of_2(head_dim)),
            ROWS=rows,
            TILE=_TILE,
            BLOCK=self._cache.shape[3],
            WINDOW=bias.window or 0,
            HAS_SLOPES=bias.slopes_H is not None,
        )
        if parts == 1:
            return out_XTHd[0].to(q_THd.dtype)
        shares_XTH1 = weights_XTH.softmax(0)[..., None]
        return (out_XTHd * shares_XTH1).sum(0).to(q_THd.dtype)

    def _pieces(self, queries: int) -> Tensor:
        """Return for each piece of at most `queries`: its sequence, and where its tokens are.

        That is: the first in the packed batch, how many, and the first's position.
        """
        if queries not in self._pieces_of:
            batch = self._batch
            starts = [0, *accumulate(batch.query_lens)]
            pieces = [
                (i, starts[i] + first, min(queries, query_len - first), before + first)
                for i, query_len in enumerate(batch.query_lens)
                for before in [batch.context_lens[i] - query_len]
                for first in range(0, query_len, queries)
            ]
            device = batch.slots_T.device
            self._pieces_of[queries] = torch.tensor(pieces, dtype=torch.int32, device=device)
        return self._pieces_of[queries]


# Lengths change with every step: a kernel compiled anew for some of them would stall it.
@triton.jit(do_not_specialize=["tokens", "table_stride"])
def _attend(
    out,
    weights,
    q,
    keys,
    values,
    tables,
    pieces,
    slopes,
    tokens,
    table_stride,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
):
    """Write one part's mixture, and the logarithm of its weight among the parts."""
    piece, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(pieces + piece * 4)
    first_token = tl.load(pieces + piece * 4 + 1)
    count = tl.load(pieces + piece * 4 + 2)
    first_at = tl.load(pieces + piece * 4 + 3)

    row_M = tl.arange(0, ROWS)
    token_M = first_token + row_M // GROUP
    head_M = kv_head * GROUP + row_M % GROUP
    at_M = first_at + row_M // GROUP
    is_row_M = row_M // GROUP < count
    dim_D = tl.arange(0, DIMS)
    is_dim_D = dim_D < HEAD_DIM
    q_at_M = token_M.to(tl.int64) * HEADS + head_M
    is_q_MD = is_row_M[:, None] & is_dim_D[None, :]
    q_MD = tl.load(q + q_at_M[:, None] * HEAD_DIM + dim_D[None, :], mask=is_q_MD, other=0.0)
    slope_M = tl.zeros([ROWS], tl.float32)
    if HAS_SLOPES:
        slope_M = tl.load(slopes + head_M, mask=is_row_M, other=0.0)

    # The piece sees keys [low, high); this part of it, whole tiles of them.
    high = first_at + count
    low = 0
    if WINDOW > 0:
        low = tl.maximum(first_at - WINDOW + 1, 0) // TILE * TILE
    tiles = tl.cdiv(tl.cdiv(high - low, TILE), tl.num_programs(2))
    low += part * tiles * TILE
    high = tl.minimum(high, low + tiles * TILE)

    best_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    mixed_MD = tl.zeros([ROWS, DIMS], tl.float32)
    for start in range(low, high, TILE):
        at_N = start + tl.arange(0, TILE)
        is_key_N = at_N < high
        block_N = tl.load(tables + sequence * table_stride + at_N // BLOCK, mask=is_key_N, other=0)
        slot_N = block_N.to(tl.int64) * BLOCK + at_N % BLOCK
        kv_at_N = (slot_N * (HEADS // GROUP) + kv_head) * HEAD_DIM
        kv_at_ND = kv_at_N[:, None] + dim_D[None, :]
        is_kv_ND = is_key_N[:, None] & is_dim_D[None, :]
        key_ND = tl.load(keys + kv_at_ND, mask=is_kv_ND, other=0.0)
        score_MN = tl.dot(q_MD, tl.trans(key_ND), input_precision="ieee") * scale
        distance_MN = at_M[:, None] - at_N[None, :]
        if HAS_SLOPES:
            score_MN -= slope_M[:, None] * distance_MN
        is_seen_MN = (distance_MN >= 0) & is_key_N[None, :]
        if WINDOW > 0:
            is_seen_MN = is_seen_MN & (distance_MN < WINDOW)
        score_MN = tl.where(is_seen_MN, score_MN, float("-inf"))
        new_best_M = tl.maximum(best_M, tl.max(score_MN, 1))
        # A row that has seen nothing yet has no best; minus infinity from itself would be NaN.
        base_M = tl.where(new_best_M == float("-inf"), 0.0, new_best_M)
        weight_MN = tl.exp(score_MN - base_M[:, None])
        shrink_M = tl.exp(best_M - base_M)
        value_ND = tl.load(values + kv_at_ND, mask=is_kv_ND, other=0.0)
        mixed_MD = mixed_MD * shrink_M[:, None]
        mixed_MD += tl.dot(weight_MN.to(value_ND.dtype), value_ND, input_precision="ieee")
        sum_M = sum_M * shrink_M + tl.sum(weight_MN, 1)
        best_M = new_best_M

    # A row that saw nothing in this part gives zeros, with a weight of nothing: its best is -inf.
    sum_M = tl.where(sum_M == 0.0, 1.0, sum_M)
    mixed_MD = mixed_MD / sum_M[:, None]
    out_at_M = part.to(tl.int64) * tokens * HEADS + q_at_M
    tl.store(out + out_at_M[:, None] * HEAD_DIM + dim_D[None, :], mixed_MD, mask=is_q_MD)
    tl.store(weights + out_at_M, best_M + tl.log(sum_M), mask=is_row_M)
