"""Checkpoint to decoder: each rank reads only the bytes it holds."""

from pathlib import Path

import torch

from mizzen.runtime.errors import WeightShapeError
from mizzen.runtime.model.arch import ArchSpec, find_checkpoint, read_json
from mizzen.runtime.model.compressed import open_compressed
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.families import family_named
from mizzen.runtime.model.huge_pages import WEIGHT_PAGES
from mizzen.runtime.model.layers import Placement, TensorShard
from mizzen.runtime.model.names import NamedSource, WeightSource
from mizzen.runtime.model.packed import Quantization, check_device
from mizzen.runtime.model.safetensors_dir import SafetensorsDir
from mizzen.runtime.parallel.group import RankGroup


def load_decoder(
    path: Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    group: RankGroup | None = None,
    quantization: Quantization = "none",
    is_trained_beside: bool = False,
) -> Decoder:
    """Read the checkpoint at `path` (a directory or a `.gguf` file) for this rank of `group`.

    The weights come frozen; `decoder.requires_grad_(True)` opens them for training and
    `decoder.prepack()` makes them fast on a CPU. With `quantization`, matrices are stored in 8 or 4
    bits as soon as they are read: final, and never all in memory as they were. Those that something
    is trained beside let gradients through.

    Raises:
        BadModelError: the checkpoint is not one we can use; the message says what to change.
    """
    device = torch.device(device)
    check_device(quantization, device)
    checkpoint = find_checkpoint(path)
    spec, source = open_checkpoint(checkpoint)
    place = Placement(choose_dtype(dtype, spec, device), device, group or RankGroup())
    decoder = Decoder(spec, place)
    WEIGHT_PAGES.begin_anew()
    keep = decoder.store if is_trained_beside else decoder.pack
    for part in decoder.parts():
        for shard in part.shards():
            _load_shard(shard, source)
        if quantization != "none":
            keep(part, quantization)
    return decoder.eval()


def _load_shard(shard: TensorShard, source: WeightSource) -> None:
    # Checked on the whole: a part of a larger tensor would load without a complaint.
    if (found := source.shape(shard.name)) != shard.whole:
        raise WeightShapeError(
            f"Tensor {shard.name} has shape {list(found)} and the model's configuration says "
            f"{list(shard.whole)}. Both must come from the same checkpoint."
        )
    with torch.no_grad():
        shard.tensor.copy_(source.read(shard.name, rows=shard.rows, columns=shard.columns))


def choose_dtype(dtype: torch.dtype | str, spec: ArchSpec, device: torch.device) -> torch.dtype:
    """Turn "auto", "float32" or "bfloat16" into the type to compute in."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    # float16 overflows where models were trained in bfloat16, and CPUs are slow with it.
    is_half = spec.dtype == torch.float16
    return torch.bfloat16 if is_half else spec.dtype


def open_checkpoint(checkpoint: Path) -> tuple[ArchSpec, WeightSource]:
    """Return what a model is and its tensors by our names, decompressed where need be.

    Raises:
        BadModelError: the checkpoint is not one we can use.
    """
    if checkpoint.suffix == ".gguf":
        from mizzen.runtime.model.gguf_file import GgufFile  # noqa: PLC0415 - only if needed

        file = GgufFile(checkpoint)
        return file.spec(), NamedSource(file, file.names(), head_dim=file.spec().head_dim)
    config = read_json(checkpoint / "config.json")
    spec = ArchSpec.from_config(config)
    names = family_named(spec.family).names
    source = open_compressed(config, SafetensorsDir(checkpoint), names)
    return spec, NamedSource(source, names, head_dim=spec.head_dim)
