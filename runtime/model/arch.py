"""What a model is, read from its checkpoint: one frozen description per family of decoders.

The decoder, the loader and the engine ask this and nothing else; none of them knows a family's
name. A new family is a row of `families.py`, and where need be a new field here.
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
from mizzen.runtime.model.families import FAMILIES, Family


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary positions: base frequency, and how long contexts stretch it."""

    theta: float = 10_000.0
    scaling: str = "none"  # none | linear | llama3 | factors
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192
    factors: tuple[float, ...] = ()  # one divisor per frequency, as GGUF files store llama3 scaling
    # GPT-J turns neighbours (i, i + 1) of its first `dims` dimensions; the others turn (i, i + d/2)
    # of all of them.
    is_interleaved: bool = False
    dims: int | None = None


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
    rope: RopeSpec = RopeSpec()
    act: str = "silu"
    norm: str = "rms"  # rms | layer
    block: str = "pre_norm"  # pre_norm | post_norm | parallel
    positions: str = "rope"  # rope | learned | alibi
    position_offset: int = 0  # rows of a learned table before position 0
    is_gated: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # per layer, how many tokens a query sees; () is all
    query_scales: tuple[float, ...] = ()  # per layer, on top of 1 / sqrt(head_dim); () is 1
    embedding_size: int | None = None  # where token vectors are narrower than the model
    has_embedding_norm: bool = False
    has_final_norm: bool = True
    has_head_bias: bool = False
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
        family = FAMILIES.get(names[0])
        if family is None:
            raise UnknownArchitectureError(
                f"Architecture {names[0]} is not supported. Supported: "
                f"{', '.join(sorted(FAMILIES))}."
            )
        try:
            return _read_spec(family, _Config(config, family))
        except KeyError as missing:
            raise NotAModelError(
                f"config.json has no field {missing}. Copy the checkpoint's own config.json again."
            ) from None
        except (TypeError, AttributeError, ZeroDivisionError) as error:
            raise NotAModelError(f"config.json has a field of the wrong type: {error}.") from None


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Fields that families and versions spell differently; the first is the one we ask for.
_SPELLINGS = {
    "hidden_size": ("n_embd", "n_embed"),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "max_position_embeddings": ("n_positions", "n_ctx", "seq_length"),
    "intermediate_size": ("ffn_dim", "n_inner"),
    "hidden_act": ("activation_function",),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "dtype": ("torch_dtype",),
}


def spell(fields: Mapping[str, Any], config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return fields by all names that this config.json has for them, or else its family's."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        spellings = (name, *_SPELLINGS.get(name, ()))
        known = [spelling for spelling in spellings if spelling in config]
        found |= dict.fromkeys(known or [family.words.get(name, name)], value)
    return found


class _Config:
    """A config.json, asked in one spelling; null counts as missing."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self._config, self._family = config, family

    def get(self, name: str, default: Any = None) -> Any:
        """Return the field in any spelling, the family's default, or the given one."""
        for spelling in (name, *_SPELLINGS.get(name, ())):
            if self._config.get(spelling) is not None:
                return self._config[spelling]
        return self._family.defaults.get(name, default)

    def __getitem__(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise KeyError(name)
        return value


def _read_spec(family: Family, config: _Config) -> ArchSpec:
    for name, value in family.required.items():
        if config.get(name, value) != value:
            raise UnknownArchitectureError(
                f"config.json sets {name} to {config[name]}, which Mizzen does not compute. "
                f"Supported: {value}."
            )
    hidden_size, heads, layers = (
        config[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    kv_heads = config.get("num_key_value_heads", heads)
    if heads % kv_heads:
        raise NotAModelError(f"{heads} query heads do not divide among {kv_heads} KV heads.")
    act = config.get("hidden_act", "silu")
    if act not in _ACTIVATIONS:
        raise UnknownArchitectureError(
            f"Activation {act} is not supported. Supported: {', '.join(sorted(_ACTIVATIONS))}."
        )
    head_dim = config.get("head_dim", hidden_size // heads)
    attention_bias = bool(config.get("attention_bias", False))
    is_post_norm = not config.get("do_layer_norm_before", True)
    embedding_size = config.get("word_embed_proj_dim", hidden_size)
    eos = config.get("eos_token_id")
    fields = {
        "family": family.name,
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": _intermediate_size(family, config),
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_len": config.get("max_position_embeddings", 2048),
        "norm_eps": config.get("norm_eps", 1e-6),
        "rope": _rope_spec(config),
        "act": _ACTIVATIONS[act],
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "windows": _windows(family, config, layers),
        "query_scales": _query_scales(config, head_dim, layers),
        "embedding_size": None if embedding_size == hidden_size else embedding_size,
        "has_final_norm": not (is_post_norm or config.get("_remove_final_layer_norm", False)),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "dtype": _dtype(config.get("dtype")),
        "bos_id": config.get("bos_token_id"),
        "eos_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        **family.fixed,
    }
    if is_post_norm:
        fields["block"] = "post_norm"
    if not config.get("enable_bias", True):
        fields.update(qkv_bias=False, o_bias=False, mlp_bias=False)
    return ArchSpec(**fields)


def _intermediate_size(family: Family, config: _Config) -> int:
    rule = family.width_ratio and family.width_ratio * config["hidden_size"]
    size: int = config.get("intermediate_size", rule) or config["intermediate_size"]
    return size


def _windows(family: Family, config: _Config, layers: int) -> tuple[int | None, ...]:
    """Return each layer's window: the first `max_window_layers` of Qwen's have none.

    Those are 28 where the checkpoint does not say, as in transformers' Qwen2Config.
    """
    window = config.get("sliding_window")
    if not window or not config.get("use_sliding_window", family.is_windowed):
        return ()
    kinds = config.get("layer_types")
    if kinds is None:
        full = config.get("max_window_layers", 28) if family.name.startswith("qwen") else 0
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])


def _query_scales(config: _Config, head_dim: int, layers: int) -> tuple[float, ...]:
    """GPT-2's options: no division by sqrt(head_dim), and one by the layer's number from 1."""
    base = 1.0 if config.get("scale_attn_weights", True) else head_dim**0.5
    if config.get("scale_attn_by_inverse_layer_idx", False):
        return tuple(base / (layer + 1) for layer in range(layers))
    return () if base == 1.0 else (base,) * layers


def _rope_spec(config: _Config) -> RopeSpec:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UnknownArchitectureError(
            f"Rotary scaling {kind} is not supported. Supported: default, linear, llama3."
        )
    if config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnknownArchitectureError("Rotary positions on a part of each head are not supported.")
    dims = config.get("rotary_dim")
    return RopeSpec(
        theta=rope.get("rope_theta") or config.get("rope_theta", 10_000.0),
        scaling="none" if kind == "default" else kind,
        factor=rope.get("factor", 1.0),
        low_freq_factor=rope.get("low_freq_factor", 1.0),
        high_freq_factor=rope.get("high_freq_factor", 4.0),
        original_max_len=rope.get("original_max_position_embeddings", 8192),
        is_interleaved=dims is not None,
        dims=dims,
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
