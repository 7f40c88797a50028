"""How fast this machine reads memory, and how often a decode step must read it.

At one sequence a step has to read every weight once; nothing else of it is as long. So bandwidth
over weight bytes bounds the tokens per second, and the share of it says how well a step is done.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch

_REPEATS = 12
_BITS = {"none": 16, "int8": 8, "int4": 4}


def read_bandwidth(array_bytes: int, *, threads: int) -> float:
    """Return bytes per second when an array of that size is summed again and again.

    The array is as large as the weights: what fits a large cache is read from there, as they are.
    """
    torch.set_num_threads(threads)
    array = torch.ones(array_bytes // 4, dtype=torch.float32)
    fastest_s = math.inf
    for _ in range(_REPEATS):
        began_at = time.perf_counter()
        array.sum()
        fastest_s = min(fastest_s, time.perf_counter() - began_at)
    return array.nbytes / fastest_s


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
