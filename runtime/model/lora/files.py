"""Adapter directories in PEFT's layout, read and written."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mizzen.runtime.errors import BadAdapterError
from mizzen.runtime.model.lora.adapter import PATHS, Adapter, LoraConfig, Pair, Site
from mizzen.runtime.model.safetensors_dir import check_whole

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_TENSOR_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight"
)
# What PEFT can write and we do not compute: each must be absent or empty.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "trainable_token_indices",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)


def load_adapter(directory: Path, *, max_rank: int | None = None) -> Adapter:
    """Read an adapter directory in PEFT's layout.

    Raises:
        BadAdapterError: files are missing, or it is of a kind or size we do not compute.
        ShardTruncatedError: its weights were cut short.
    """
    try:
        config = _read_config(json.loads((directory / CONFIG_FILE).read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise BadAdapterError(
            f"{directory} has no readable {CONFIG_FILE}: {type(error).__name__}. An adapter is a "
            f"directory with {CONFIG_FILE} and {WEIGHTS_FILE}."
        ) from None
    if max_rank is not None and config.rank > max_rank:
        raise BadAdapterError(
            f"The adapter's rank is {config.rank}, above the limit of {max_rank}. "
            "Raise --max-lora-rank or train with a smaller rank."
        )
    if not (directory / WEIGHTS_FILE).exists():
        raise BadAdapterError(f"{directory} has no {WEIGHTS_FILE}. Other formats are not read.")
    check_whole(directory / WEIGHTS_FILE)
    try:
        tensors = load_file(directory / WEIGHTS_FILE)
    except SafetensorError as error:
        raise BadAdapterError(f"{WEIGHTS_FILE} is damaged: {error}. Copy it again.") from None
    pairs = _pair_up(tensors)
    targets = tuple(t for t in PATHS if any(site.target == t for site in pairs))
    return Adapter(replace(config, targets=targets), pairs)


def save_adapter(directory: Path, adapter: Adapter, *, base_model: str) -> None:
    """Write an adapter so that PEFT, and any engine that reads its layout, can load it."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        site.tensor_name(side): matrix.detach().cpu().contiguous()
        for site, pair in adapter.pairs.items()
        for side, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    document = _peft_document(adapter.config, base_model=base_model)
    (directory / CONFIG_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def _read_config(document: Mapping[str, Any]) -> LoraConfig:
    """Read PEFT's adapter_config.json; `targets` come from the tensors, not from here."""
    if document.get("peft_type") != "LORA":
        raise BadAdapterError(
            f"The adapter's peft_type is {document.get('peft_type')}; only LORA is supported."
        )
    used = [name for name in _UNSUPPORTED if document.get(name)]
    if document.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise BadAdapterError(
            f"The adapter uses {', '.join(used)}, which Mizzen does not compute. "
            "Train it without, or merge it into the base model."
        )
    rank, alpha = document.get("r"), document.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1:
        raise BadAdapterError(f"{CONFIG_FILE} states no rank (r).")
    if not isinstance(alpha, int | float):
        raise BadAdapterError(f"{CONFIG_FILE} has a lora_alpha that is no number.")
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        dropout=document.get("lora_dropout", 0.0),
        is_rank_stabilized=bool(document.get("use_rslora", False)),
    )


def _peft_document(config: LoraConfig, *, base_model: str) -> dict[str, Any]:
    """Return the document PEFT and other engines read."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.targets),
        "use_rslora": config.is_rank_stabilized,
        "bias": "none",
        "inference_mode": True,
    }


def _pair_up(tensors: Mapping[str, Tensor]) -> dict[Site, Pair]:
    sides: dict[Site, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR_NAME.fullmatch(name)
        if found is None or found[2] not in PATHS:
            raise BadAdapterError(
                f"The adapter changes {name.removeprefix('base_model.model.')}, which is not a "
                f"linear we adapt. Supported: {', '.join(PATHS)}."
            )
        sides.setdefault(Site(int(found[1]), found[2]), {})[found[3]] = tensor
    if any(len(side) < 2 for side in sides.values()):
        raise BadAdapterError("The adapter has a lora_A without its lora_B, or the reverse.")
    return {site: Pair(sides[site]["A"], sides[site]["B"]) for site in sorted(sides)}
