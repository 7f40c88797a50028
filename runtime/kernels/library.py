"""Loads the compiled kernels that suit this processor."""

import ctypes
import logging
from ctypes import POINTER, Structure, c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path

import torch

from mizzen.runtime.kernels.compile import levels, library_path
from mizzen.runtime.kernels.team import openmp

log = logging.getLogger(__name__)

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as numbers.h has them
ACTIVATIONS = {"silu": 0, "relu": 1, "gelu_tanh": 2}  # as kernels.h has them; silu is a gate's


class Attention(Structure):
    """The arguments of `paged_attention`, as attention.h describes them."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "out", "keys", "values")),
        *((name, c_void_p) for name in ("slots", "tables", "decodes", "prompts", "slopes")),
        *((name, c_long) for name in ("q_stride", "kv_stride", "tokens")),
        *((name, c_long) for name in ("count", "prompt_count", "table_width")),
        *((name, c_long) for name in ("heads", "kv_heads", "dim", "page", "window")),
        ("scale", c_float),
        ("type", c_int),
        *((name, c_long) for name in ("kv_per_item", "splits", "prompt_items")),
    ]


class CausalAttention(Structure):
    """The arguments of `causal_attention` and its gradients, as kernels.h describes them."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "out", "log_totals")),
        *((name, c_void_p) for name in ("d_out", "d_q", "d_k", "d_v", "ends", "slopes")),
        *((name, c_long) for name in ("sequences", "tokens", "heads")),
        *((name, c_long) for name in ("kv_heads", "width", "window")),
        ("scale", c_float),
    ]


class Linear(Structure):
    """The arguments of `linear`, as linear.c describes them."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "weight", "scales", "bias", "residual", "out")),
        *((name, c_long) for name in ("tokens", "inputs", "outputs")),
        ("out_type", c_int),
    ]


class NormWeights(Structure):
    """What a norm multiplies by and, unless it is an RMS norm, adds."""

    _fields_ = [("weight", c_void_p), ("shift", c_void_p)]


class Layer(Structure):
    """A layer's weights, as stack.c has them."""

    _fields_ = [
        *((name, NormWeights) for name in ("attention_norm", "feed_forward_norm")),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
        *((name, Linear) for name in ("qkv", "out", "up", "down")),
        ("slopes", c_void_p),
        ("window", c_long),
    ]


class Stack(Structure):
    """The arguments of `run_stack`, as stack.c describes them."""

    _fields_ = [
        ("layers", POINTER(Layer)),
        ("attention", Attention),
        ("layer_bytes", c_long),
        *((name, c_void_p) for name in ("stream", "normed", "projected", "mixed", "gated")),
        *((name, c_void_p) for name in ("cos", "sin")),
        ("count", c_long),
        ("eps", c_float),
        ("is_interleaved", c_int),
        ("activation", c_int),
    ]


_SIGNATURES: dict[str, list[type]] = {
    "normalise": [*[c_void_p] * 4, *[c_long] * 2, c_float, c_int, c_int],
    "activate": [c_void_p, *[c_long] * 2, *[c_int] * 3],
    "silu_gate": [*[c_void_p] * 3, *[c_long] * 3, c_int, c_int],
    "rotate": [*[c_void_p] * 3, *[c_long] * 4, c_int, c_int],
    "linear": [POINTER(Linear), c_int],
    "use_team": [c_void_p],
    "paged_attention": [POINTER(Attention), c_int],
    "run_stack": [POINTER(Stack), c_int],
    "causal_attention": [POINTER(CausalAttention), c_int],
    "causal_attention_gradients": [POINTER(CausalAttention), c_int],
}


@cache
def kernels() -> ctypes.CDLL | None:
    """Return the kernels, or None where none were compiled: torch then does their work."""
    for level in levels():
        if runs(level) and is_current(library_path(level)):
            return load(library_path(level))
    log.warning(
        "Mizzen's CPU kernels are not compiled from its present sources, so torch does their work, "
        "more slowly. Install a C compiler and Mizzen again, or run "
        "`python -m mizzen.runtime.kernels.compile`."
    )
    return None


def has_linear() -> bool:
    """Can `linear` be called?"""
    loaded = kernels()
    return loaded is not None and bool(loaded.has_linear())


def is_current(path: Path) -> bool:
    """Was a library compiled from sources that agree with these structures?"""
    if not path.exists():
        return False
    argument_bytes = getattr(ctypes.CDLL(str(path)), "argument_bytes", None)
    expected = sum(map(ctypes.sizeof, (Stack, Layer, CausalAttention)))
    return argument_bytes is not None and argument_bytes() == expected


def load(path: Path) -> ctypes.CDLL:
    """Load one library and give it torch's threads."""
    loaded = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    runtime = openmp()
    if runtime is not None:
        loaded.use_team(ctypes.cast(runtime.GOMP_parallel, c_void_p))
    return loaded


def runs(level: str) -> bool:
    """Can this processor run a level?"""
    capability = torch.backends.cpu.get_cpu_capability()
    if level == "amx":
        return (
            runs("avx512bf16")
            and torch.cpu._is_amx_tile_supported()
            and torch.cpu._init_amx()  # the system allots the tiles to processes that ask
        )
    if level == "avx512bf16":
        return capability == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    wanted = {"avx512": ("AVX512",), "avx2": ("AVX512", "AVX2")}
    return level not in wanted or capability in wanted[level]
