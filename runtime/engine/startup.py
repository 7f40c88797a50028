"""Builds the engine's parts from its settings: how long, how many, how large, in which order."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

from mizzen.runtime.engine.adapters import AdapterTable
from mizzen.runtime.engine.api import FinishedRequest, ModelSizes, Recorder
from mizzen.runtime.engine.batch import BatchBuilder, StepInput, dummy_step
from mizzen.runtime.engine.blocks import BlockPool
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.draft import (
    DraftModel,
    DraftUnfitError,
    check_draft,
    draft_block_bytes,
    draft_kv,
    load_draft,
)
from mizzen.runtime.engine.flight import Launcher
from mizzen.runtime.engine.graphs import graph_rows, rows_at_start
from mizzen.runtime.engine.kv_room import choose_blocks
from mizzen.runtime.engine.loop import Loop
from mizzen.runtime.engine.ranks import ModelRanks, agree_on_blocks, follow, load_rank
from mizzen.runtime.engine.sampler import Sampler
from mizzen.runtime.engine.scheduler import Limits, Scheduler
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.errors import BadModelError
from mizzen.runtime.handover import wait_for_memory
from mizzen.runtime.host import cpu_count
from mizzen.runtime.kernels.team import dismiss_team
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import Placement
from mizzen.runtime.parallel.follower import Follower
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.ranks import Ranks

# A step of this many tokens is the longest pause a prompt can put between two tokens of others.
STEP_TOKENS = {"cpu": 512, "cuda": 8192}
# While others decode, fewer of a prompt. On two cores with AMX and SmolLM2-135M in bfloat16, 8
# streams had a token every 25 ms, and beside 56 tokens of a prompt every 48; beside 112 every 58,
# with a 99th percentile of 4.5 times the median instead of 2.5. On one core half as many tokens
# took as long at a context of 1,500, a quarter at 4,000.
BESIDE_DECODES = {"cpu": 56, "cuda": 8192}
EVEN_CONTEXT = {"cpu": 1500, "cuda": None}
AHEAD_ON = {"cuda"}
WARM_UP_PROMPT, WARM_UP_ROWS = 64, 8
FIRST_LAYER, TABLE = "model.layers.0.", "model.embed_tokens.weight"


class ContextTooLongError(BadModelError):
    """More context was asked for than the model was made for."""

    reason = "ContextTooLong"


@dataclass(frozen=True, slots=True)
class Parts:
    """A loaded, warm model and the loop that will run it."""

    tokenizer: Tokenizer
    arch: ArchSpec
    model_len: int
    sizes: ModelSizes
    ranks: ModelRanks
    loop: Loop
    start_seconds: dict[str, float]


class NullRecorder:
    """Takes timings nobody asked for."""

    def on_first_token(self, ttft_s: float) -> None:
        """Ignore it."""

    def on_token(self, itl_s: float) -> None:
        """Ignore it."""

    def on_step(self, step_s: float, tokens: int) -> None:
        """Ignore it."""

    def on_finish(self, finished: FinishedRequest) -> None:
        """Ignore it."""


def start_parts(config: EngineConfig, recorder: Recorder | None = None) -> Parts:
    """Load everything and warm it up; the loop is not started yet.

    Raises:
        BadModelError: the model or the settings cannot be used.
    """
    seconds: dict[str, float] = {}
    device = choose_device(config)
    threads = threads_per_rank(config)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    # What is wrong with the model itself comes before what its tokenizer lacks.
    ArchSpec.from_dir(config.model)
    with _timed(seconds, "tokenizer"):
        tokenizer = Tokenizer.load(config.model)
    with _timed(seconds, "ranks"):
        ranks = Ranks(
            config.ranks,
            follow,
            (config, device.type, threads),
            stages=config.pipeline_parallel_size,
            device=device.type,
            nodes=config.nodes,
            agreement=config.agreement,
        )
    try:
        return _start_model(config, ranks, tokenizer, device, recorder, seconds)
    except BaseException:
        ranks.stop()
        raise


def _start_model(
    config: EngineConfig,
    ranks: Ranks,
    tokenizer: Tokenizer,
    device: torch.device,
    recorder: Recorder | None,
    seconds: dict[str, float],
) -> Parts:
    wait_for_memory(device)
    with _timed(seconds, "weights"):
        decoder = load_rank(config, device, ranks.group)
    model_len = choose_model_len(config, decoder.spec)
    sizes = model_sizes(decoder)
    draft = _load_draft(config, decoder, model_len)
    blocks = choose_blocks(
        config,
        decoder,
        model_len,
        partial(agree_on_blocks, ranks, decoder),
        beside_bytes=draft_block_bytes(config, draft) if draft is not None else 0,
    )
    step_tokens = max(
        config.max_num_batched_tokens or STEP_TOKENS[device.type], config.max_num_seqs
    )
    pool = BlockPool(
        num_blocks=blocks,
        block_size=config.block_size,
        enable_caching=config.enable_prefix_caching,
    )

    def builder() -> BatchBuilder:
        return BatchBuilder(
            rows=config.max_num_seqs,
            blocks_per_row=pool.blocks_for(model_len),
            block_size=config.block_size,
        )

    guesser = None
    if draft is not None:
        guesser = DraftModel(
            config, draft, builder=builder(), kv=draft_kv(config, draft.spec, blocks=blocks)
        )
    model = ModelRanks(config, decoder, ranks, blocks, draft=guesser)
    with _timed(seconds, "warm_up"):
        for step in warm_up_steps(step_tokens, config, device):
            model.warm_up(step)
    dismiss_team()  # the loop computes from now on, in a thread of its own
    limits = Limits(
        step_tokens=step_tokens,
        # Who names a step's tokens means every step.
        beside_decodes=config.max_num_batched_tokens or BESIDE_DECODES[device.type],
        even_context=None if config.max_num_batched_tokens else EVEN_CONTEXT[device.type],
        max_running=config.max_num_seqs,
        model_len=model_len,
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        draft_tokens=config.speculative_tokens,
    )
    eos_ids = frozenset((*tokenizer.eos_token_ids, *decoder.spec.eos_ids))
    loop = Loop(
        scheduler=Scheduler(pool, limits),
        launcher=Launcher(
            builder=builder(), ranks=model, sampler=Sampler(eos_token_ids=tuple(eos_ids))
        ),
        ranks=model,
        adapters=AdapterTable(max_loras=config.max_loras),
        eos_ids=eos_ids,
        recorder=recorder or NullRecorder(),
        is_ahead=device.type in AHEAD_ON,
    )
    model.serve(loop.fail)
    return Parts(tokenizer, decoder.spec, model_len, sizes, model, loop, seconds)


def build_follower(config: EngineConfig) -> Follower:
    """Return the ranks of a pod that follows another; they load and warm up as it says."""
    assert config.nodes is not None, "only pods of a group follow"
    device = choose_device(config)
    return Follower(
        config.nodes,
        config.ranks,
        follow,
        (config, device.type, threads_per_rank(config)),
        stages=config.pipeline_parallel_size,
        device=device.type,
    )


def choose_device(config: EngineConfig) -> torch.device:
    """Return where the model runs."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def threads_per_rank(config: EngineConfig) -> int:
    """Return how many threads a rank computes with."""
    return config.cpu_threads or max(1, cpu_count() // config.ranks_per_pod)


def choose_model_len(config: EngineConfig, spec: ArchSpec) -> int:
    """Return the context's length.

    Raises:
        ContextTooLongError: the model was not made for so long a context.
    """
    if config.max_model_len is None:
        return spec.max_len
    if config.max_model_len > spec.max_len:
        raise ContextTooLongError(
            f"The model's context has {spec.max_len} tokens and {config.max_model_len} were asked "
            f"for. Set the maximum model length to at most {spec.max_len}."
        )
    return config.max_model_len


def model_sizes(decoder: Decoder) -> ModelSizes:
    """Return what the whole model is made of, though this rank holds but a share."""
    spec, device = decoder.spec, decoder.place.device
    parameters = _parameters(spec)
    of_a_layer = [count for name, count in parameters.items() if name.startswith(FIRST_LAYER)]
    return ModelSizes(
        layers=spec.layers,
        hidden=spec.hidden_size,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        context_tokens=spec.max_len,
        parameters=sum(parameters.values()),
        layer_parameters=sum(of_a_layer),
        table_parameters=parameters[TABLE],
        dtype=str(decoder.place.dtype).removeprefix("torch."),
        device_bytes=torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0,
    )


def _parameters(spec: ArchSpec) -> dict[str, int]:
    """Return how many numbers each of the model's tensors has."""
    # Of a model without memory: what this rank holds is a share, and packed by now.
    empty = Decoder(spec, Placement(torch.bfloat16, torch.device("meta"), RankGroup()))
    return {shard.name: prod(shard.whole) for shard in empty.shards()}


def _load_draft(config: EngineConfig, decoder: Decoder, model_len: int) -> Decoder | None:
    if config.speculative_model is None:
        return None
    if config.speculative_tokens == 0:
        raise DraftUnfitError(
            "A draft model is given and no tokens for it to guess. Set --speculative-tokens, to 4 "
            "for a start, or leave the draft model out."
        )
    draft = load_draft(config, decoder.place.device)
    check_draft(draft.spec, decoder.spec, model_len=model_len)
    return draft


def warm_up_steps(step_tokens: int, config: EngineConfig, device: torch.device) -> list[StepInput]:
    """Return steps on the block nobody reads: a prompt, one decode, several.

    Kernels are chosen, memory is grown and graphs are captured by these, and not under the first
    request.
    """
    prompt = min(step_tokens, WARM_UP_PROMPT)
    captured = rows_at_start(graph_rows(config, device))
    decodes = captured or [1, min(WARM_UP_ROWS, config.max_num_seqs)]
    shapes = [[prompt], *([1] * rows for rows in decodes)]
    return [dummy_step(lens, block_size=config.block_size) for lens in shapes]


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    began_at = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - began_at
