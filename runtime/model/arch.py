"""What a model is, read from its checkpoint: one frozen description per family of decoders.

The decoder, the loader and the engine ask this and nothing else; none of them knows a family's
name. A new family is new fields here (norm kind, position kind, fused layouts), not a new decoder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mizzen.runtime.errors import (
    ModelNotFoundError,
    NotAModelError,
    PickledWeightsRefusedError,
    RemoteCodeRefusedError,
    UnknownArchitectureError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary positions: base frequency and how long contexts stretch it."""

    theta: float = 10_000.0
    scaling: str = "none"  # none | linear | llama3 | factors
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192
    factors: tuple[float, ...] = ()  # one divisor per frequency, as GGUF files store llama3 scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchSpec:
    """Everything the decoder needs to know to compute what the checkpoint means."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_len: int
    norm_eps: float
    rope: RopeSpec
    act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    dtype: torch.dtype = torch.bfloat16
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def from_dir(cls, path: Path) -> "ArchSpec":
        """Read the description of the checkpoint at `path`: a directory or a `.gguf` file."""
        checkpoint = find_checkpoint(path)
        if checkpoint.suffix == ".gguf":
            from mizzen.runtime.model.gguf_file import GgufFile  # noqa: PLC0415 - only if needed

            return GgufFile(checkpoint).spec()
        return cls.from_config(read_json(checkpoint / "config.json"))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ArchSpec":
        """Turn a Hugging Face `config.json` (version 4 or 5 spelling) into a description."""
        if "auto_map" in config:
            raise RemoteCodeRefusedError(
                "config.json asks to run code from the model's directory (auto_map). Mizzen never "
                "does that: use a checkpoint of a built-in architecture and remove auto_map."
            )
        names = config.get("architectures") or [f"model_type {config.get('model_type')!r}"]
        family = _FAMILIES.get(names[0])
        if family is None:
            raise UnknownArchitectureError(
                f"Architecture {names[0]} is not supported. Supported: "
                f"{', '.join(sorted(_FAMILIES))}."
            )
        try:
            return _llama_spec(family, config)
        except KeyError as missing:
            raise NotAModelError(
                f"config.json has no field {missing}. Copy the checkpoint's own config.json again."
            ) from None
        except (TypeError, AttributeError, ZeroDivisionError) as error:
            raise NotAModelError(f"config.json has a field of the wrong type: {error}.") from None


_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def _llama_spec(family: str, config: Mapping[str, Any]) -> ArchSpec:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise NotAModelError(f"{heads} query heads do not divide among {kv_heads} KV heads.")
    act = config.get("hidden_act", "silu")
    if act not in _ACTIVATIONS:
        raise UnknownArchitectureError(
            f"Activation {act} is not supported. Supported: {', '.join(sorted(_ACTIVATIONS))}."
        )
    attention_bias = bool(config.get("attention_bias", False))
    eos = config.get("eos_token_id")
    return ArchSpec(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        max_len=_max_len(family, config),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=_rope_spec(config),
        act=_ACTIVATIONS[act],
        # Qwen2 has biases on q, k and v alone and no flag that says so.
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        tied=bool(config.get("tie_word_embeddings", False)),
        dtype=_dtype(config.get("dtype") or config.get("torch_dtype")),
        bos_id=config.get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def _max_len(family: str, config: Mapping[str, Any]) -> int:
    max_len: int = config.get("max_position_embeddings", 2048)
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window", family == "mistral")
    # Up to its window's length, windowed attention is plain attention: we serve that much.
    return min(max_len, window) if window and is_used else max_len


def _rope_spec(config: Mapping[str, Any]) -> RopeSpec:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UnknownArchitectureError(
            f"Rotary scaling {kind} is not supported. Supported: default, linear, llama3."
        )
    if config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnknownArchitectureError("Rotary positions on a part of each head are not supported.")
    return RopeSpec(
        theta=rope.get("rope_theta") or config.get("rope_theta") or 10_000.0,
        scaling="none" if kind == "default" else kind,
        factor=rope.get("factor", 1.0),
        low_freq_factor=rope.get("low_freq_factor", 1.0),
        high_freq_factor=rope.get("high_freq_factor", 4.0),
        original_max_len=rope.get("original_max_position_embeddings", 8192),
    )


def _dtype(name: str | None) -> torch.dtype:
    dtype = getattr(torch, name or "float32", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that belongs to a checkpoint."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise NotAModelError(f"{path.name} is missing beside the weights.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotAModelError(f"{path.name} is not valid JSON: {error}.") from None
    if not isinstance(document, dict):
        raise NotAModelError(f"{path.name} does not hold a JSON object.")
    return document


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint directory or the `.gguf` file that `path` means, or say what is wrong.

    A directory that holds one GGUF file and no config.json means that file.
    """
    if not path.exists():
        raise ModelNotFoundError(f"There is no file or directory {path}. Check the model's source.")
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise NotAModelError(
            f"{path.name} is not a .gguf file; for safetensors name its directory."
        )
    if (path / "config.json").exists():
        _refuse_pickles(path)
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise NotAModelError(f"{path} holds {len(found)} .gguf files: name one of them.")
    _refuse_pickles(path)
    raise NotAModelError(f"{path} has neither config.json nor a .gguf file.")


def _refuse_pickles(path: Path) -> None:
    has_pickles = any(next(path.glob(glob), None) for glob in ("*.bin", "*.pt", "*.pth"))
    if has_pickles and next(path.glob("*.safetensors"), None) is None:
        raise PickledWeightsRefusedError(
            f"{path} has its weights only as pickles (.bin or .pt), which can run code when read. "
            "Convert them to safetensors."
        )
