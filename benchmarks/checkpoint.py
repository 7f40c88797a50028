"""How large a checkpoint is, read from its headers; imports no torch, whose pages would be shared.

Memory that a measured server and the measuring process both map would count as half of each.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

_BITS = {"none": 16, "int8": 8, "int4": 4}


def step_weight_bytes(model: Path, quantization: str = "none") -> int:
    """Return the weight bytes that one decode step reads, scales of quantized ones left out.

    A table that only looks up tokens is not read whole; one that also gives the scores is, and
    keeps 8 bits where the others have 4.
    """
    shapes = _shapes(model)
    heads = [name for name in shapes if name.startswith("lm_head")]
    tables = [name for name in shapes if "embed_tokens" in name or name.endswith("wte.weight")]
    head = (heads or tables)[0]
    total = 0
    for name, shape in shapes.items():
        if name in tables and name != head:
            continue
        bits = _BITS[quantization] if len(shape) == 2 else 16
        total += math.prod(shape) * max(bits, 8 if name == head else 0) // 8
    return total


def weight_bytes(model: Path) -> int:
    """Return the bytes of all weights in bfloat16."""
    return 2 * sum(math.prod(shape) for shape in _shapes(model).values())


def _shapes(model: Path) -> dict[str, list[int]]:
    """Return every tensor's shape; a safetensors file begins with a JSON header."""
    shapes = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {name: about["shape"] for name, about in header.items() if "shape" in about}
    return shapes


def kv_token_bytes(model: Path) -> int:
    """Return the bytes of one token's keys and values in bfloat16, of models in LLaMA's words."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_dim
