"""Decodes on a GPU: the runner over the Triton kernel, and steps repeated from fixed buffers.

Kernels are interpreted and a graph is a plain call here; only the capture itself needs a GPU.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, GPTJConfig, LlamaConfig, MistralConfig

from mizzen.runtime.attention.base import KvShape
from mizzen.runtime.attention.triton_paged import PagedTriton
from mizzen.runtime.engine.api import SamplingParams
from mizzen.runtime.engine.batch import BatchBuilder, StepInput, dummy_step
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.graphs import (
    SIZES,
    DecodeGraphs,
    Output,
    graph_rows,
    pack_rows,
    rows_at_start,
    size_for,
)
from mizzen.runtime.engine.runner import Runner
from mizzen.runtime.engine.scheduler import Chunk
from mizzen.runtime.engine.sequence import Sequence
from mizzen.runtime.engine.startup import warm_up_steps
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from tests.fixtures.rank_work import random_tokens
from tests.fixtures.tiny_models import TINY, make_model

OLD: dict[str, Any] = {"vocab_size": 300, "n_layer": 2, "n_head": 3, "initializer_range": 0.2}
FAMILIES = {
    "four heads over two": LlamaConfig(**TINY),
    "ALiBi, three heads": BloomConfig(**OLD, hidden_size=48),
    "a sliding window": MistralConfig(**TINY, sliding_window=9),
    "GPT-J's heads of 256": GPTJConfig(
        vocab_size=300, n_embd=256, n_layer=1, n_head=1, n_positions=128, rotary_dim=64
    ),
}
LENS = (13, 1, 22, 34)  # of the prompts
BLOCKS = 24


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mizzen.runtime.attention.triton_paged._ENOUGH_PROGRAMS", 16)


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Decoder:
    make_model(LlamaConfig(**TINY)).save_pretrained(tmp_path)
    return load_decoder(tmp_path, dtype="float32")


def kv_of(decoder: Decoder) -> KvShape:
    spec = decoder.spec
    return KvShape(spec.layers, BLOCKS, spec.kv_heads, spec.head_dim)


def sequences() -> list[Sequence]:
    """Return sequences with random tokens and scattered blocks for them and a few more."""
    tokens, free = random_tokens(300, sum(LENS)).tolist(), list(range(BLOCKS - 1, 0, -2))
    return [
        Sequence(
            request_id=str(row),
            arrival=row,
            token_ids=[tokens.pop() for _ in range(length)],
            sampling=SamplingParams(),
            blocks=[free.pop() for _ in range((length + 4) // 16 + 1)],
            row=row,
        )
        for row, length in enumerate(LENS)
    ]


def steps(sequences: list[Sequence], *counts: list[int]) -> list[StepInput]:
    """Return steps in which each sequence computes so many tokens; beyond its prompt, tokens 7."""
    builder = BatchBuilder(rows=len(sequences), blocks_per_row=8, block_size=16)
    built = []
    for step in counts:
        chunks = []
        for seq, count in zip(sequences, step, strict=True):
            missing = seq.computed + count - len(seq.token_ids)
            seq.token_ids += [7] * missing
            if count:
                end = seq.computed + count
                samples = end == len(seq.token_ids)
                chunks.append(Chunk(seq, seq.computed, count, samples))
            seq.computed += count
        built.append(builder.build(sorted(chunks, key=lambda chunk: chunk.size > 1)))
    return built


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_the_runner_computes_the_same_over_the_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Any
) -> None:
    make_model(config).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, dtype="float32")
    # Prompts whole and in part; decodes beside a prompt; decodes alone.
    built = steps(sequences(), [13, 1, 0, 20], [1, 1, 22, 14], [1, 1, 1, 1])
    reference = Runner(decoder, kv=kv_of(decoder))
    expected = [reference.run(step) for step in built]
    monkeypatch.setattr("mizzen.runtime.engine.runner.paged_attention", PagedTriton)
    runner = Runner(decoder, kv=kv_of(decoder))
    for step, logits in zip(built, expected, strict=True):
        torch.testing.assert_close(runner.run(step), logits, atol=1e-4, rtol=1e-4)


class Calls:
    """Stands in for the capture: keeps the computation and its output, and repeats it."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, compute: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
        self.captured += 1
        output = compute()

        def replay() -> None:
            for old, new in zip(output, compute(), strict=True):
                old.copy_(new)

        return replay, output


@torch.inference_mode()
def test_padded_steps_from_fixed_buffers_compute_what_plain_ones_do(tiny_llama: Decoder) -> None:
    kv = kv_of(tiny_llama)
    # The third step has fewer rows and shorter tables than the second in the same buffers.
    prompts, *decodes = steps(
        sequences(), list(LENS), [1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]
    )
    plain, cached = Runner(tiny_llama, kv=kv), Runner(tiny_llama, kv=kv)
    for runner in (plain, cached):
        runner.run(prompts)
    calls = Calls()
    graphs = DecodeGraphs(tiny_llama, cached._cache, max_rows=4, max_blocks=8, capture=calls)
    assert not graphs.can_run(prompts)
    for step in decodes:
        assert graphs.can_run(step)
        expected = plain.run(step)
        found = graphs.run(step)
        torch.testing.assert_close(found.logits_RV, expected, atol=1e-4, rtol=1e-4)
        hidden = [plain.last_hidden(row) for row in range(len(step.query_lens))]
        torch.testing.assert_close(found.hidden_RD, torch.tensor(hidden), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kept(cached._cache), kept(plain._cache))
    assert calls.captured == 2, "one for up to four rows, one for two"


def kept(cache: Tensor) -> Tensor:
    """Return the blocks that somebody reads."""
    return cache[:, :, 1:]


def test_a_runner_takes_graphs_for_decodes_and_drops_them_with_the_weights(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Decoder
) -> None:
    calls = Calls()
    monkeypatch.setattr("mizzen.runtime.engine.runner.CudaCapture", lambda: calls)
    plain = Runner(tiny_llama, kv=kv_of(tiny_llama))
    runner = Runner(tiny_llama, kv=kv_of(tiny_llama), graph_rows=4)
    # In the last step, one token of the longest prompt is computed and is not its last.
    built = steps(sequences()[:3], [13, 1, 20], [1, 1, 1])
    for step in built:
        torch.testing.assert_close(runner.run(step), plain.run(step), atol=1e-4, rtol=1e-4)
    assert len(built[1].sample_at_N) == 2 and calls.captured == 1
    assert runner.last_hidden(1) == pytest.approx(plain.last_hidden(1), abs=1e-4)
    runner.use(tiny_llama)
    runner.run(built[1])
    assert calls.captured == 2, "other weights lie at other addresses"
    runner.release()
    assert runner._graphs is None


@pytest.mark.parametrize(
    ("rows", "size"), [(1, 1), (3, 4), (4, 4), (9, 16), (33, 48), (200, 256), (257, None)]
)
def test_the_least_size_that_holds_the_rows(rows: int, size: int | None) -> None:
    assert size_for(rows) == size


def test_padding_touches_only_the_block_nobody_reads() -> None:
    step = steps(sequences(), list(LENS), [1, 1, 1, 0])[1]
    packed = pack_rows(step, 4)
    assert packed[:3, 1].tolist() == [13, 1, 22]  # positions
    assert packed[:3, 3:].tolist() == step.block_tables_SB.tolist()
    assert packed[3].tolist() == [0] * packed.shape[1]


def test_what_is_no_plain_decode_is_not_repeated(tiny_llama: Decoder) -> None:
    cache = kv_of(tiny_llama).allocate(dtype=torch.float32)
    graphs = DecodeGraphs(tiny_llama, cache, max_rows=3, max_blocks=8, capture=Calls())
    cases = {(1,): True, (1, 1, 1): True, (1, 1, 1, 1): False, (2,): False, (1, 2): False}
    for lens, expected in cases.items():
        assert graphs.can_run(dummy_step(list(lens), block_size=16)) == expected
    adapted = dummy_step([1, 1], block_size=16)
    adapted.lora_slots_S[1] = 2
    assert not graphs.can_run(adapted)


def test_the_common_sizes_are_captured_at_the_start_and_only_on_a_gpu(tmp_path: Path) -> None:
    gpu, config = torch.device("cuda"), EngineConfig(model=tmp_path, max_num_seqs=20)
    assert graph_rows(config, gpu) == 20
    assert graph_rows(config, torch.device("cpu")) == 0
    assert graph_rows(EngineConfig(model=tmp_path, enforce_eager=True), gpu) == 0
    assert rows_at_start(20) == [16, 8, 4, 2, 1]
    assert set(rows_at_start(300)) < set(SIZES)
    lens = [step.query_lens for step in warm_up_steps(512, config, gpu)]
    assert lens == [[64], *([1] * rows for rows in (16, 8, 4, 2, 1))]
    lens = [step.query_lens for step in warm_up_steps(512, config, torch.device("cpu"))]
    assert lens == [[64], [1], [1] * 8]
