"""A trained model as a folder that any Hugging Face reader understands, ours included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import ArchSpec, find_checkpoint, spell
from mizzen.runtime.model.families import family_named
from mizzen.runtime.model.names import to_checkpoint
from mizzen.runtime.train.errors import JobConfigError

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Of GGUF files, which do not name them.
_ARCHITECTURES = {
    "bloom": "BloomForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def write_model(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    *,
    spec: ArchSpec,
    base_model: Path,
    tokenizer: Tokenizer,
) -> None:
    """Write weights, configuration, tokenizer and chat template into a folder."""
    dtype = published_dtype(spec)
    moved = ((name, tensor.to("cpu", dtype).contiguous()) for name, tensor in weights)
    names = family_named(spec.family).names
    tensors = to_checkpoint(moved, names, head_dim=spec.head_dim)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_description(folder, spec=spec, base_model=base_model, tokenizer=tokenizer)


def write_description(
    folder: Path,
    *,
    spec: ArchSpec,
    base_model: Path,
    tokenizer: Tokenizer,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write configuration, tokenizer and template; `changes` are what config.json says instead.

    They are spelled as the base's config.json spells them; None takes a field away.
    A base that was compressed is so no longer: only `changes` can say that the result is.
    """
    base = find_checkpoint(base_model)
    if base.is_dir():
        copy_tokenizer(base, folder)
        config = json.loads((base / "config.json").read_text())
    else:
        config = build_config(spec, published_dtype(spec))
        _write_tokenizer(folder, tokenizer)
    config.pop("quantization_config", None)
    said = config | spell(changes or {}, config, family_named(spec.family))
    _write_json(folder / "config.json", {k: v for k, v in said.items() if v is not None})


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy a directory's tokenizer, chat template and generation settings, where it has them."""
    for name in _COPIED:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)


def check_exportable(spec: ArchSpec) -> None:
    """Refuse at the start what could not be written at the end.

    Raises:
        JobConfigError: the base's rotary scaling has no config.json spelling.
    """
    if spec.rope.scaling == "factors":
        raise JobConfigError(
            "What this GGUF model becomes cannot be written down: its rotary scaling is given as "
            "bare factors. Use a safetensors base model, or train an adapter (adaptation.type "
            "lora)."
        )


def published_dtype(spec: ArchSpec) -> torch.dtype:
    """Return the type weights are published in: the base's, but never float16 (it overflows)."""
    return torch.float32 if spec.dtype == torch.float32 else torch.bfloat16


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write for a GGUF base what a Hugging Face base would have brought along."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens},
    )
    _write_json(folder / "generation_config.json", {"eos_token_id": list(tokenizer.eos_token_ids)})
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template)


def build_config(spec: ArchSpec, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json that means this architecture, in its family's words."""
    family = family_named(spec.family)
    fields = {
        "architectures": [_ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_len,
        "norm_eps": spec.norm_eps,
        "hidden_act": _ACTIVATIONS[spec.act],
        "attention_bias": spec.o_bias,
        "mlp_bias": spec.mlp_bias,
        "tie_word_embeddings": spec.tied,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": spec.bos_id,
        "eos_token_id": list(spec.eos_ids),
        **(_rope_config(spec) if spec.positions == "rope" else {}),
    }
    said = {name: value for name, value in fields.items() if name not in family.implied}
    return spell(said, {}, family)


def _rope_config(spec: ArchSpec) -> dict[str, Any]:
    rope = spec.rope
    document: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.scaling in ("linear", "llama3"):
        document["rope_scaling"] = {
            "rope_type": rope.scaling,
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_len,
        }
    return document


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
