"""From chunks to the packed arrays of one step. Plain numpy, so a step is a small message."""

# Shapes: S sequences in the step, T packed tokens, B blocks in the longest block table, N tokens
# that are sampled from, M of the T that the step before samples.
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mizzen.runtime.engine.scheduler import Chunk
from mizzen.runtime.engine.sequence import Sequence

Ints = NDArray[np.int64]
NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class StepInput:
    """All that a rank needs to compute a step; every rank gets the same.

    Sequences that compute a single token come first. A step that is decided before the one ahead
    of it has landed lacks some tokens; rank 0 fills them in.
    """

    token_ids_T: Ints
    positions_T: Ints
    slots_T: Ints
    query_lens: list[int]
    context_lens: list[int]
    block_tables_SB: Ints
    sample_at_N: Ints  # indices into T
    lora_slots_S: list[int]
    unknown_at_M: Ints = field(default_factory=lambda: NONE)  # indices into T: zeros, to be filled
    sampled_at_M: Ints = field(default_factory=lambda: NONE)  # from these rows of the step before


def dummy_step(query_lens: list[int], *, block_size: int) -> StepInput:
    """Return a step that reads and writes only the block that belongs to nobody."""
    total, longest = sum(query_lens), max(query_lens)
    zeros = np.zeros(total, dtype=np.int64)
    return StepInput(
        token_ids_T=zeros,
        positions_T=zeros,
        slots_T=zeros,
        query_lens=query_lens,
        context_lens=query_lens,
        block_tables_SB=np.zeros((len(query_lens), -(-longest // block_size)), dtype=np.int64),
        sample_at_N=np.cumsum(query_lens) - 1,
        lora_slots_S=[0] * len(query_lens),
    )


def lone_step(
    token_ids: Items[int], start: int, blocks: Items[int], block_size: int, lora_slot: int
) -> StepInput:
    """Return a step of one sequence, whose tokens from `start` are all sampled from."""
    positions_T = np.arange(start, start + len(token_ids))
    table_B = np.array(blocks, dtype=np.int64)
    return StepInput(
        token_ids_T=np.array(token_ids, dtype=np.int64),
        positions_T=positions_T,
        slots_T=table_B[positions_T // block_size] * block_size + positions_T % block_size,
        query_lens=[len(token_ids)],
        context_lens=[start + len(token_ids)],
        block_tables_SB=table_B[None, : -(-(start + len(token_ids)) // block_size)],
        sample_at_N=np.arange(len(token_ids)),
        lora_slots_S=[lora_slot],
    )


class BatchBuilder:
    """Keeps each running sequence's block table in a row of one array.

    Only rows that changed are written, so a decode step gathers instead of rebuilding.
    """

    def __init__(self, *, rows: int, blocks_per_row: int, block_size: int) -> None:
        self._block_size = block_size
        self._table = np.zeros((rows, blocks_per_row), dtype=np.int64)
        self._written: list[list[int] | None] = [None] * rows  # the very list that fills the row
        self._lengths = [0] * rows

    def build(
        self, chunks: Items[Chunk], row_of: Mapping[Sequence, int] | None = None
    ) -> StepInput:
        """Pack the chunks in their order, which is the scheduler's: single tokens first.

        `row_of` says where the step in flight samples a sequence's token that is not known yet.
        """
        for chunk in chunks:
            self._write_row(chunk.seq.row, chunk.seq.blocks)
        rows = np.array([chunk.seq.row for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        counts = np.array([chunk.size for chunk in chunks])
        ends = np.cumsum(counts)
        contexts = starts + counts
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        blocks = self._table[np.repeat(rows, counts), positions // self._block_size]
        width = -(-int(contexts.max()) // self._block_size)
        unknown_at_M, sampled_at_M = _unknown(chunks, row_of or {})
        return StepInput(
            token_ids_T=_token_ids(chunks),
            positions_T=positions,
            slots_T=blocks * self._block_size + positions % self._block_size,
            query_lens=counts.tolist(),
            context_lens=contexts.tolist(),
            block_tables_SB=self._table[rows, :width],
            sample_at_N=_sample_at(chunks, ends),
            lora_slots_S=[chunk.seq.lora_slot for chunk in chunks],
            unknown_at_M=unknown_at_M,
            sampled_at_M=sampled_at_M,
        )

    def _write_row(self, row: int, blocks: list[int]) -> None:
        # A preempted sequence comes back with a new list, so identity tells old from new.
        known = self._lengths[row] if self._written[row] is blocks else 0
        if known != len(blocks):
            self._table[row, known : len(blocks)] = blocks[known:]
            self._written[row], self._lengths[row] = blocks, len(blocks)


def _sample_at(chunks: Items[Chunk], ends: Ints) -> Ints:
    if not any(chunk.draft for chunk in chunks):
        return ends[[chunk.samples for chunk in chunks]] - 1
    places = [
        place
        for chunk, end in zip(chunks, ends.tolist(), strict=True)
        if chunk.samples
        for place in range(end - 1 - len(chunk.draft), end)
    ]
    return np.array(places, dtype=np.int64)


def _token_ids(chunks: Items[Chunk]) -> Ints:
    ids: list[int] = []
    for chunk in chunks:
        if chunk.size == chunk.count == 1:
            known = chunk.start < len(chunk.seq.token_ids)
            ids.append(chunk.seq.token_ids[chunk.start] if known else 0)
        else:
            ids += chunk.seq.token_ids[chunk.start : chunk.start + chunk.count]
            ids += chunk.draft
    return np.array(ids, dtype=np.int64)


def _unknown(chunks: Items[Chunk], row_of: Mapping[Sequence, int]) -> tuple[Ints, Ints]:
    """Return the places among the packed tokens that wait for one, and the rows it comes from."""
    # Only single tokens wait, and those come first: the chunk's index is its token's place.
    pairs = [
        (place, row_of[chunk.seq])
        for place, chunk in enumerate(chunks)
        if chunk.start == len(chunk.seq.token_ids) and chunk.count
    ]
    at_M, rows_M = np.array(pairs, dtype=np.int64).reshape(-1, 2).T.copy()
    return at_M, rows_M
