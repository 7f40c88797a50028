"""`mizzen plan`: whether a model fits an accelerator, before anything is deployed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mizzen.operator.planning.fit import Fit


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A model's directory, its config.json, a .gguf file, or hf://ORG/NAME[@REVISION] "
            "or s3://BUCKET/PREFIX, of which config.json alone is fetched."
        ),
    ],
    gpu: Annotated[
        str,
        typer.Option(
            help="Accelerator: t4, l4, a10g, rtx4090, l40s, a100-40gb, a100, h100, h200, b200, "
            "mi300x."
        ),
    ] = "h100",
    gpu_memory_gib: Annotated[
        float | None, typer.Option(help="Memory of a device, for one that is not in the list.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16, float32, or auto: bfloat16.")
    ] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt plus answer; the model's own when left out.")
    ] = None,
    request_tokens: Annotated[
        int, typer.Option(help="Prompt plus answer of a usual request.")
    ] = 2048,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="Devices that share each layer; the fewest when left out.")
    ] = None,
    pipeline_parallel_size: Annotated[
        int, typer.Option(min=1, help="Stages the layers are cut into, each on as many devices.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print the memory a model takes, the devices it needs and how many requests then fit."""
    from mizzen.cli.model_config import ModelFileError, read_config
    from mizzen.operator.planning.fit import ACCELERATORS, GIB, Wish, plan_fit
    from mizzen.operator.planning.model_shape import DTYPE_BYTES, read_model_shape

    try:
        shape = read_model_shape(read_config(model))
        gib = gpu_memory_gib if gpu_memory_gib is not None else ACCELERATORS.get(gpu.lower())
        if gib is None or gib <= 0:
            raise ModelFileError(
                f"The memory of a {gpu} is not known. Name one of {', '.join(ACCELERATORS)}, or "
                "add --gpu-memory-gib."
            )
        if dtype not in (*DTYPE_BYTES, "auto"):
            raise ModelFileError(f"--dtype {dtype} is none of auto, {', '.join(DTYPE_BYTES)}.")
        longest = max_model_len or shape.max_len
        wish = Wish(
            accelerator=gpu.lower(),
            device_bytes=int(gib * GIB),
            dtype="bfloat16" if dtype == "auto" else dtype,
            max_len=longest,
            request_tokens=max(1, min(request_tokens, longest)),
            tensor=tensor_parallel_size,
            pipeline=pipeline_parallel_size,
        )
        fit = plan_fit(shape, wish)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps(asdict(fit), indent=2) if as_json else _as_text(fit, wish.request_tokens))


def _as_text(fit: Fit, request_tokens: int) -> str:
    gib = 1 << 30
    rows = (
        ("parameters", f"{fit.parameters:,}"),
        ("weights", f"{fit.weight_bytes / gib:.2f} GiB as {fit.dtype}"),
        ("KV cache", f"{fit.kv_bytes_per_token / 1024:.1f} KiB a token"),
        ("devices per replica", _devices(fit)),
        (
            "memory of a device",
            f"{fit.device_bytes / gib:.1f} GiB: {fit.weight_bytes_per_rank / gib:.2f} weights, "
            f"{fit.kv_cache_bytes_per_rank / gib:.2f} KV cache, the rest for a step's activations",
        ),
        ("KV cache holds", f"{fit.kv_tokens:,} tokens"),
        (
            "requests at once",
            f"{fit.max_concurrency} of {request_tokens} tokens, or "
            f"{fit.max_concurrency_longest} of {fit.max_len}",
        ),
    )
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _devices(fit: Fit) -> str:
    if fit.pipeline == 1:
        return f"{fit.tensor} x {fit.accelerator}"
    count = fit.tensor * fit.pipeline
    return f"{count} x {fit.accelerator}: {fit.pipeline} stages of {fit.tensor}"
