"""Checkpoints with random weights in well-known shapes: speed does not depend on the values.

    python -m benchmarks.random_models gpt2-124m|qwen3-0.6b|llama-8b|tiny

Prints the directory, in the user's cache; written once. Weights are bfloat16, the tokenizer is
one of bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from hack.tiny_model import write_tiny_model

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
    },
    "gpt2-124m": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "llama-8b": _LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000,
    },
}
_FILE_BYTES = 2 << 30


def random_model(name: str, *, device: str = "cpu") -> Path:
    """Return the directory of a shape's checkpoint; `device` draws the numbers."""
    target = _cache() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / name
        write_random_model(partial, SHAPES[name], device=device)
        partial.rename(target)  # whole or not at all
    return target


def write_random_model(folder: Path, config: dict[str, Any], *, device: str = "cpu") -> None:
    """Write configuration, tokenizer and weights into `folder`."""
    write_tiny_model(folder)  # for its tokenizer
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weight_map = {}
    for index, tensors in enumerate(_files(config, device)):
        file = f"model-{index:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _files(config: dict[str, Any], device: str) -> Iterator[dict[str, torch.Tensor]]:
    """Yield tensors in groups of a file's size, so that a large model never is in memory whole."""
    generator = torch.Generator(device).manual_seed(7)
    group: dict[str, torch.Tensor] = {}
    for name, shape in _shapes(config).items():
        wide = len(shape) > 1
        # Norms near one and narrow matrices keep activations finite through every layer.
        drawn = torch.randn(shape, generator=generator, device=device) * (0.02 if wide else 0.1)
        is_norm = not wide and name.endswith("weight")
        group[name] = (drawn + (1.0 if is_norm else 0.0)).to(torch.bfloat16).cpu()
        if sum(tensor.nbytes for tensor in group.values()) > _FILE_BYTES:
            yield group
            group = {}
    if group:
        yield group


def _shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Return the names and shapes that transformers would save."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - seconds

    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **settings)
        )
    # Tied names share one tensor, which is saved once, under the first.
    return {name: tensor.shape for name, tensor in model.named_parameters()}


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "mizzen" / "models" / "random"


def main() -> None:
    """Print the directory of one shape's checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--again", action="store_true", help="write it anew")
    arguments = parser.parse_args()
    if arguments.again:
        shutil.rmtree(_cache() / arguments.shape, ignore_errors=True)
    print(random_model(arguments.shape, device="cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
