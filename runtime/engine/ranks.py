"""How the loop reaches the model: one rank in this process, or a group that rank 0 leads."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mizzen.runtime.attention.base import KvShape
from mizzen.runtime.engine.batch import StepInput
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.runner import Runner
from mizzen.runtime.engine.wire import Allocate, Clear, Load, decode, encode
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import Adapter, load_adapter
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.ranks import Inbox, Ranks

log = logging.getLogger(__name__)


class ModelRanks(Protocol):
    """Every rank of the model, driven as one."""

    def run(self, step: StepInput) -> Tensor | None:
        """Compute a step; return float32 logits_NV of the tokens to sample from."""

    def load_adapter(self, slot: int, adapter: Adapter, path: Path) -> None:
        """Fill a slot on every rank."""

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot on every rank."""

    def check(self) -> None:
        """Raise RankLostError if a rank is gone."""

    def stop(self) -> None:
        """End the other ranks."""


class OneRank:
    """The whole model in this process: no message, no copy."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.run = runner.run

    def load_adapter(self, slot: int, adapter: Adapter, path: Path) -> None:
        """Fill a slot."""
        self._runner.load_adapter(slot, adapter)

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot."""
        self._runner.clear_adapter(slot)

    def check(self) -> None:
        """There is no other rank to lose."""

    def stop(self) -> None:
        """There is no other rank to end."""


class LedRanks:
    """Rank 0 of a group: tells the others what it does, then does it."""

    def __init__(self, runner: Runner, ranks: Ranks) -> None:
        self._runner = runner
        self._ranks = ranks
        self.check = ranks.check
        self.stop = ranks.stop

    def run(self, step: StepInput) -> Tensor | None:
        """Compute a step on every rank."""
        self._ranks.send(encode(step))
        return self._runner.run(step)

    def load_adapter(self, slot: int, adapter: Adapter, path: Path) -> None:
        """Fill a slot on every rank; the others read the files themselves."""
        # Own rank first: what does not fit is refused here, before anyone else has seen it.
        self._runner.load_adapter(slot, adapter)
        self._ranks.send(encode(Load(slot, path)))

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot on every rank."""
        self._ranks.send(encode(Clear(slot)))
        self._runner.clear_adapter(slot)


def load_rank(config: EngineConfig, device: torch.device, group: RankGroup) -> Decoder:
    """Load this rank's weights, ready to serve."""
    decoder = load_decoder(
        config.model,
        dtype=config.dtype,
        device=device,
        group=group,
        quantization=config.quantization,
    )
    decoder.prepack()
    return decoder


def follow(
    group: RankGroup, inbox: Inbox, config: EngineConfig, device_type: str, threads: int
) -> None:
    """Be a rank above 0: do what rank 0 says until it says no more."""
    device = torch.device(device_type, group.rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(threads)
    decoder = load_rank(config, device, group)
    runner: Runner | None = None
    for data in inbox:
        message = decode(data)
        if isinstance(message, Allocate):
            runner = Runner(
                decoder,
                kv=own_kv(config, decoder, blocks=message.blocks),
                max_rows=config.max_num_seqs,
            )
            continue
        assert runner is not None, "the KV cache comes before the first step"
        match message:
            case StepInput():
                runner.run(message)
            case Load(slot, path):
                runner.load_adapter(slot, load_adapter(path))
            case Clear(slot):
                runner.clear_adapter(slot)


def own_kv(config: EngineConfig, decoder: Decoder, *, blocks: int) -> KvShape:
    """Return the shape of this rank's KV cache; ranks may hold different numbers of heads."""
    return KvShape(
        layers=decoder.spec.layers,
        blocks=blocks,
        kv_heads=decoder.heads.kv.size,
        head_dim=decoder.spec.head_dim,
        block_tokens=config.block_size,
    )


def largest_kv(kv: KvShape, decoder: Decoder) -> KvShape:
    """Return the shape of the rank with the most KV heads; memory must suffice for that one."""
    size, heads = decoder.group.size, decoder.spec.kv_heads
    return replace(kv, kv_heads=max(1, -(-heads // size)))
