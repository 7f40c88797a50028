"""Decode steps as captured CUDA graphs: one launch instead of hundreds of small ones.

A graph repeats the very same operations on the very same memory. So a step's numbers are copied
into fixed buffers, and its rows are padded up to one of a few sizes, each of which is captured when
a step first needs it. Every rank is given the same steps in the same order, so they capture
together, collectives included; the start's warm-up steps ask for the common sizes.

Source: vLLM's Model Runner V2 (docs/design/model_runner_v2.md); torch.cuda.graph.
"""

# Torch leaves graphs untyped.
# mypy: disable-error-code="no-untyped-call"

# Shapes: R padded rows, one sequence each; B blocks in a table, D model width, V vocabulary.
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mizzen.runtime.attention.base import DUMP_BLOCK, PagedBatch
from mizzen.runtime.engine.batch import StepInput
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.unknown import fill_unknown
from mizzen.runtime.model.decoder import Decoder

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SIZES_AT_START = (32, 16, 8, 4, 2, 1)  # largest first: smaller graphs fit into its memory
TOKEN, POSITION, SLOT, TABLE = range(4)  # columns of the buffer; the table takes all that follow


class Output(NamedTuple):
    """What a graph leaves behind: overwritten when any graph runs again."""

    hidden_RD: Tensor
    logits_RV: Tensor


Capture = Callable[[Callable[[], Output]], tuple[Callable[[], None], Output]]


def graph_rows(config: EngineConfig, device: torch.device) -> int:
    """Return how many rows a captured step may have; 0 where none is.

    What goes from stage to stage is not captured: there each kernel is launched singly.
    """
    is_captured = device.type == "cuda" and not config.enforce_eager
    return config.max_num_seqs if is_captured and config.pipeline_parallel_size == 1 else 0


def size_for(rows: int) -> int | None:
    """Return the least size that holds so many rows, None if there is none."""
    index = bisect_left(SIZES, rows)
    return SIZES[index] if index < len(SIZES) else None


def rows_at_start(max_rows: int) -> list[int]:
    """Return which numbers of rows are worth capturing before the first request."""
    return [size for size in SIZES_AT_START if size <= max_rows]


def pack_rows(step: StepInput, size: int) -> np.ndarray:
    """Return a decode step's numbers, padded to `size` rows that touch only the dump block."""
    rows, width = step.block_tables_SB.shape
    packed = np.zeros((size, TABLE + width), dtype=np.int64)
    packed[rows:, TABLE] = DUMP_BLOCK
    packed[:rows, TOKEN] = step.token_ids_T
    packed[:rows, POSITION] = step.positions_T
    packed[:rows, SLOT] = step.slots_T
    packed[:rows, TABLE:] = step.block_tables_SB
    return packed


class DecodeGraphs:
    """The graphs of one model on one KV cache; both must outlive it."""

    def __init__(
        self, decoder: Decoder, cache: Tensor, *, max_rows: int, max_blocks: int, capture: Capture
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._max_rows = max_rows
        self._capture = capture
        largest = size_for(max_rows) or SIZES[-1]
        shape = (largest, TABLE + max_blocks)
        self._buffer = torch.zeros(shape, dtype=torch.int64, device=cache.device)
        self._graph_of: dict[int, tuple[Callable[[], None], Output]] = {}

    def can_run(self, step: StepInput) -> bool:
        """Whether it is a step of decodes alone, without adapters, that some size holds."""
        rows = len(step.query_lens)
        return (
            rows == len(step.token_ids_T)
            and rows <= min(self._max_rows, SIZES[-1])
            and not any(step.lora_slots_S)
        )

    def run(self, step: StepInput, before_N: Tensor | None = None) -> Output:
        """Compute the step; return its rows' outputs, which stay until the next run.

        `before_N` are the tokens that the step before has sampled, for places that wait for them.
        """
        size = size_for(len(step.query_lens))
        assert size is not None, "`can_run` comes first"
        packed = pack_rows(step, size)
        # From memory of this step alone: the loop may be a step ahead of the device.
        self._buffer[:size, : packed.shape[1]].copy_(torch.from_numpy(packed))
        fill_unknown(self._buffer[:, TOKEN], step, before_N)
        if size not in self._graph_of:
            self._graph_of[size] = self._capture(lambda: self._compute(size))
        replay, output = self._graph_of[size]
        replay()
        rows = len(step.query_lens)
        return Output(output.hidden_RD[:rows], output.logits_RV[:rows])

    def _compute(self, size: int) -> Output:
        rows_RW = self._buffer[:size]
        positions_R = rows_RW[:, POSITION]
        order_R = torch.arange(size, device=positions_R.device)
        pieces_R4 = torch.stack((order_R, order_R, torch.ones_like(order_R), positions_R), dim=1)
        batch = PagedBatch(
            query_lens=[1] * size,
            context_lens=[1] * size,  # the true ones are in the pieces
            block_tables_SB=rows_RW[:, TABLE:],
            slots_T=rows_RW[:, SLOT].contiguous(),
        )
        # Imported here: torch's builds for CPUs bring no Triton, and never come here.
        from mizzen.runtime.attention.triton_paged import PagedTriton  # noqa: PLC0415

        attend = PagedTriton(self._cache, batch, pieces_P4=pieces_R4.to(torch.int32))
        hidden_RD = self._decoder(rows_RW[:, TOKEN].contiguous(), positions_R.contiguous(), attend)
        return Output(hidden_RD, self._decoder.logits(hidden_RD))


class CudaCapture:
    """Captures on the current GPU, all graphs in one pool of memory: only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
        """Return what runs the graph, and where it leaves its output."""
        # Once for real, on a stream of its own: kernels are compiled and libraries take their
        # memory now, which they must not do in a capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that reads new weights, may go on allocating.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = compute()
        return graph.replay, output
