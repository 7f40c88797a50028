"""What the kernels compute, each with torch's own way beside it.

torch's is the reference, and serves other devices, other types and training: kernels have no
gradient.
"""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, H heads, d head dimension, F inner width of a feed-forward.
import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.kernels import library
from mizzen.runtime.kernels.library import ACTIVATIONS, TYPES


def are_used(x: Tensor) -> bool:
    """Do the kernels work on such a tensor, now?"""
    return (
        x.device.type == "cpu"
        and x.dtype in TYPES
        and not torch.is_grad_enabled()
        and library.kernels() is not None
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the last dimension to unit root mean square, then by the weight."""
    if are_used(x):
        return _normalise(x, weight, None, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Centre the last dimension and scale it to unit variance, then apply weight and bias."""
    if are_used(x):
        return _normalise(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    kernels = library.kernels()
    assert kernels is not None, "`are_used` has asked"
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    shift = None if bias is None else bias.data_ptr()
    pointers = x.data_ptr(), weight.data_ptr(), shift, out.data_ptr()
    rows, kind, threads = x.numel() // width, TYPES[x.dtype], torch.get_num_threads()
    kernels.normalise(*pointers, rows, width, eps, kind, threads)
    return out


def relu(units_TF: Tensor) -> Tensor:
    """Return max(x, 0). What is returned may be the units themselves, changed in place."""
    return units_TF if _activate(units_TF, "relu") else F.relu(units_TF)


def gelu_tanh(units_TF: Tensor) -> Tensor:
    """Return GELU by its tanh formula; as with `relu`, perhaps the units themselves."""
    if _activate(units_TF, "gelu_tanh"):
        return units_TF
    return F.gelu(units_TF, approximate="tanh")


def _activate(units_TF: Tensor, activation: str) -> bool:
    """Change the units in place, if the kernels work on them."""
    kernels = library.kernels()
    if kernels is None or not are_used(units_TF) or not units_TF.is_contiguous():
        return False
    rows, width = units_TF.shape
    kinds = ACTIVATIONS[activation], TYPES[units_TF.dtype]
    kernels.activate(units_TF.data_ptr(), rows, width, *kinds, torch.get_num_threads())
    return True


def silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    kernels = library.kernels()
    if kernels is None or not are_used(gate_TF) or gate_TF.stride() != up_TF.stride():
        return F.silu(gate_TF) * up_TF
    rows, width = gate_TF.shape
    out_TF = gate_TF.new_empty(rows, width)
    kernels.silu_gate(
        gate_TF.data_ptr(),
        up_TF.data_ptr(),
        out_TF.data_ptr(),
        rows,
        gate_TF.stride(0),
        width,
        TYPES[gate_TF.dtype],
        torch.get_num_threads(),
    )
    return out_TF


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool = False) -> Tensor:
    """Turn the pairs (i, i + d/2) of each head, or (i, i + 1), as Hugging Face lays them out.

    The tables are `rope_tables`'. What is returned may be `x` itself, changed in place.
    """
    kernels = library.kernels()
    if kernels is not None and are_used(x_THd) and x_THd.stride()[1:] == (x_THd.shape[2], 1):
        tokens, heads, dim = x_THd.shape
        pointers = x_THd.data_ptr(), cos.data_ptr(), sin.data_ptr()
        sizes = tokens, x_THd.stride(0), heads, dim
        kernels.rotate(*pointers, *sizes, is_interleaved, TYPES[x_THd.dtype])
        return x_THd
    if is_interleaved:
        partners = x_THd.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partners = x_THd.roll(x_THd.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_THd * cos, partners, sin)
