"""How many blocks the KV cache has: the same number on every rank, so the least of them counts."""

from collections.abc import Callable
from dataclasses import replace

import torch

from mizzen.runtime.attention.base import KvShape
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.errors import BadModelError
from mizzen.runtime.host import memory_available_bytes
from mizzen.runtime.model.decoder import Decoder

KV_SHARE = {"cpu": 0.3, "cuda": 0.85}  # of the memory that is free once the weights are there
GIB = 1 << 30


class KvCacheTooSmallError(BadModelError):
    """The KV cache cannot hold one sequence of the wanted length."""

    reason = "KvCacheTooSmall"


def own_kv(config: EngineConfig, decoder: Decoder, *, blocks: int) -> KvShape:
    """Return the shape of this rank's KV cache; ranks may hold different layers and heads."""
    return KvShape(
        layers=decoder.layers.size,
        blocks=blocks,
        kv_heads=decoder.heads.kv.size,
        head_dim=decoder.spec.head_dim,
        block_tokens=config.block_size,
    )


def room_for_blocks(config: EngineConfig, decoder: Decoder, *, beside_bytes: int = 0) -> int:
    """Return how many blocks this rank's memory holds: as wanted, or a share of what is free.

    `beside_bytes` is what a block costs in another model's cache, out of the same memory.
    """
    device = decoder.place.device
    block_bytes = own_kv(config, decoder, blocks=1).block_bytes(decoder.place.dtype) + beside_bytes
    if config.kv_cache_gib is not None:
        return int(config.kv_cache_gib * GIB) // config.ranks // block_bytes
    # Each GPU has memory of its own.
    sharing = config.ranks_per_pod if device.type == "cpu" else 1
    return int(free_bytes(device) * KV_SHARE[device.type]) // sharing // block_bytes


def least_room(decoder: Decoder, room: int) -> int:
    """Return the least room of all ranks, each of which says its own."""
    least = decoder.group.stages.least(torch.tensor([room], device=decoder.place.device))
    return int(least.item())


def choose_blocks(
    config: EngineConfig,
    decoder: Decoder,
    model_len: int,
    agree: Callable[[int], int],
    *,
    beside_bytes: int = 0,
) -> int:
    """Return how many blocks every rank's KV cache has, the one that nobody reads included.

    `agree` is given the room of this rank, the first, and returns the least of all.

    Raises:
        KvCacheTooSmallError: they would not hold one sequence of `model_len` tokens.
    """
    per_sequence = -(-model_len // config.block_size)
    room = room_for_blocks(config, decoder, beside_bytes=beside_bytes)
    if config.kv_cache_gib is None:
        room = min(room, config.max_num_seqs * per_sequence)
    blocks = agree(room)
    if blocks < per_sequence:
        block_bytes = _largest_block_bytes(config, decoder) + beside_bytes
        holds, need_gib = (
            blocks * config.block_size,
            per_sequence * block_bytes * config.ranks / GIB,
        )
        raise KvCacheTooSmallError(
            f"The KV cache holds {holds} tokens and the context {model_len}. Give it at least "
            f"{need_gib:.2f} GiB, or set the maximum model length to at most {holds}."
        )
    return blocks + 1  # and the one that is written to but never read


def _largest_block_bytes(config: EngineConfig, decoder: Decoder) -> int:
    """Return what a block costs on the rank with the most layers and heads."""
    spec, group = decoder.spec, decoder.group
    largest = replace(
        own_kv(config, decoder, blocks=1),
        layers=-(-spec.layers // group.stages.count),
        kv_heads=max(1, -(-spec.kv_heads // group.size)),
    )
    return largest.block_bytes(decoder.place.dtype)


def free_bytes(device: torch.device) -> int:
    """Return how much of a device's memory is free; of the host's, what this pod may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return memory_available_bytes()
