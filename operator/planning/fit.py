"""Whether a model fits an accelerator, on how many of them, and how many requests then fit. Pure.

A rank holds its share of its stage's matrices, all of the norms, and the keys and values of its
heads: of one that no other needs more memory than. How
much of a device the KV cache gets is the runtime's rule (runtime/engine/kv_room.py,
`choose_blocks`): a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mizzen.operator.planning.model_shape import DTYPE_BYTES, ModelShape

GIB = 1 << 30
# What `nvidia-smi` and `rocm-smi` show as total, in GiB.
ACCELERATORS = {
    "t4": 15.0,
    "l4": 22.5,
    "a10g": 22.5,
    "rtx4090": 24.0,
    "l40s": 45.0,
    "a100-40gb": 40.0,
    "a100": 80.0,
    "h100": 79.6,
    "h200": 140.4,
    "b200": 179.0,
    "mi300x": 192.0,
}
# Of the memory that is free once the weights are there; the rest is for the activations of a step,
# graphs and collectives.
KV_SHARE = 0.85
_DRIVER_BYTES = GIB // 2  # what the driver's context takes of each device
_BLOCK_TOKENS = 16
DEVICES_PER_NODE = 8


class DoesNotFitError(ValueError):
    """No allowed number of devices holds the model; the text has the numbers and the ways out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for."""

    accelerator: str
    device_bytes: int
    dtype: str
    max_len: int  # longest prompt plus answer
    request_tokens: int  # of a usual request, prompt plus answer
    tensor: int | None = None  # ranks of a stage; chosen when None
    pipeline: int = 1  # stages
    max_tensor: int = DEVICES_PER_NODE
    kv_cache_bytes: int | None = None  # over all ranks; what the devices have left when None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a model lies on its devices."""

    parameters: int
    dtype: str
    weight_bytes: int
    weight_bytes_per_rank: int
    kv_bytes_per_token: int  # over all ranks, replicated heads counted once
    kv_bytes_per_token_per_rank: int
    kv_tokens: int
    tensor: int
    pipeline: int
    accelerator: str
    device_bytes: int
    kv_cache_bytes_per_rank: int
    max_len: int
    max_concurrency: int  # requests of the usual length at the same time
    max_concurrency_longest: int  # requests of the longest length


def plan_fit(shape: ModelShape, wish: Wish) -> Fit:
    """Return the fit on the fewest devices that hold the model and one longest request.

    Raises:
        DoesNotFitError: none of the allowed numbers of ranks does.
    """
    if wish.max_len > shape.max_len:
        raise DoesNotFitError(
            f"The model's context has {shape.max_len} tokens and {wish.max_len} were asked for. "
            f"Ask for at most {shape.max_len}."
        )
    if wish.pipeline > shape.layers:
        raise DoesNotFitError(
            f"The model has {shape.layers} layers and cannot be cut into {wish.pipeline} stages. "
            f"Ask for at most {shape.layers}."
        )
    allowed = possible_tensor(shape, up_to=wish.max_tensor)
    if wish.tensor is not None and wish.tensor not in possible_tensor(shape, up_to=wish.tensor):
        raise DoesNotFitError(
            f"{shape.heads} query heads over {shape.kv_heads} KV heads cannot be spread over "
            f"{wish.tensor} ranks. Choose one of: {_listed(allowed)}."
        )
    for tensor in (wish.tensor,) if wish.tensor is not None else allowed:
        fit = _fit_on(shape, wish, tensor)
        if fit.kv_tokens >= wish.max_len:
            return fit
    raise DoesNotFitError(_why_not(shape, wish, fit, chosen=wish.tensor is not None))


def measured_fit(shape: ModelShape, wish: Wish, *, tensor: int, kv_tokens: int) -> Fit:
    """Return how the model lies on a replica that runs, whose KV cache is known."""
    fit = _fit_on(shape, wish, tensor)
    return replace(
        fit,
        kv_cache_bytes_per_rank=kv_tokens * fit.kv_bytes_per_token_per_rank,
        kv_tokens=kv_tokens,
        max_concurrency=kv_tokens // _in_blocks(wish.request_tokens),
        max_concurrency_longest=kv_tokens // _in_blocks(wish.max_len),
    )


def possible_tensor(shape: ModelShape, *, up_to: int) -> list[int]:
    """Return the numbers of ranks that the heads can be spread over.

    Up to one rank for each KV head any number does; beyond, KV heads are held twice or more, by
    equally many ranks each. Source: runtime/parallel/shard.py, `head_shard`.
    """
    return [
        size
        for size in range(1, up_to + 1)
        if size <= shape.kv_heads or (size % shape.kv_heads == 0 and size <= shape.heads)
    ]


def _fit_on(shape: ModelShape, wish: Wish, tensor: int) -> Fit:
    weights = shape.parameters * DTYPE_BYTES[wish.dtype]
    rank_weights = int(_rank_parameters(shape, tensor, wish.pipeline) * DTYPE_BYTES[wish.dtype])
    kv_bytes = shape.kv_bytes_per_token(wish.dtype)
    head_bytes = kv_bytes // shape.layers // shape.kv_heads
    rank_kv_heads = -(-shape.kv_heads // tensor)
    rank_kv_bytes = head_bytes * rank_kv_heads * shape.stage_layers(wish.pipeline)
    free = max(0, wish.device_bytes - _DRIVER_BYTES - rank_weights)
    kv_cache = int(free * KV_SHARE)
    if wish.kv_cache_bytes is not None:
        kv_cache = min(free, wish.kv_cache_bytes // (tensor * wish.pipeline))
    kv_tokens = kv_cache // (rank_kv_bytes * _BLOCK_TOKENS) * _BLOCK_TOKENS
    return Fit(
        parameters=shape.parameters,
        dtype=wish.dtype,
        weight_bytes=weights,
        weight_bytes_per_rank=rank_weights,
        kv_bytes_per_token=kv_bytes,
        kv_bytes_per_token_per_rank=rank_kv_bytes,
        kv_tokens=kv_tokens,
        tensor=tensor,
        pipeline=wish.pipeline,
        accelerator=wish.accelerator,
        device_bytes=wish.device_bytes,
        kv_cache_bytes_per_rank=kv_cache,
        max_len=wish.max_len,
        max_concurrency=kv_tokens // _in_blocks(wish.request_tokens),
        max_concurrency_longest=kv_tokens // _in_blocks(wish.max_len),
    )


def _rank_parameters(shape: ModelShape, tensor: int, stages: int) -> float:
    """Return what the largest rank holds: heads and layers that do not divide make it larger."""
    kv_share = -(-shape.kv_heads // tensor) / shape.kv_heads
    group = shape.heads // shape.kv_heads
    sharers = max(1, tensor // shape.kv_heads)
    q_share = kv_share * -(-group // sharers) / group
    layers, width = shape.stage_layers(stages), shape.hidden * shape.head_dim
    queries = 2 * layers * width * shape.heads
    keys = 2 * layers * width * shape.kv_heads
    rest = shape.stage_parameters(stages) - queries - keys
    return queries * q_share + keys * kv_share + rest / tensor


def _in_blocks(tokens: int) -> int:
    return -(-tokens // _BLOCK_TOKENS) * _BLOCK_TOKENS


def _why_not(shape: ModelShape, wish: Wish, fit: Fit, *, chosen: bool) -> str:
    devices = f"{fit.tensor * fit.pipeline} x {wish.accelerator}"
    ways = []
    if fit.kv_tokens > 0:
        ways.append(f"set the maximum length to at most {fit.kv_tokens} tokens")
    if chosen:
        ways.append(f"raise tensor parallelism above {fit.tensor}")
    if fit.pipeline < shape.layers:
        ways.append(f"raise pipeline parallelism above {fit.pipeline}")
    if wish.dtype == "float32":
        ways.append("use bfloat16, which halves it")
    ways.append("choose a device with more memory")
    one = fit.kv_bytes_per_token_per_rank * wish.max_len
    return (
        f"On {devices} a rank needs {fit.weight_bytes_per_rank / GIB:.1f} GiB of the device's "
        f"{wish.device_bytes / GIB:.1f} GiB for weights and {one / GIB:.1f} GiB for one request of "
        f"{wish.max_len} tokens, and {fit.kv_cache_bytes_per_rank / GIB:.1f} GiB are left for "
        f"the KV cache. To make it fit: {'; or '.join(ways)}."
    )


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)
