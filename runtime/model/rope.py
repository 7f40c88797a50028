"""Rotary positions: the angles a position turns each pair of a head's dimensions by."""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, H heads of this rank, d head dimension.
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.model.arch import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Return one angular speed per turned pair, in float32, after context scaling."""
    dims = rope.dims or head_dim
    exponents = torch.arange(0, dims, 2, dtype=torch.int64).float() / dims
    speeds = 1.0 / (rope.theta**exponents)
    if rope.scaling == "linear":
        return speeds / rope.factor
    if rope.scaling == "factors":
        return speeds / torch.tensor(rope.factors)
    if rope.scaling == "llama3":
        return _llama3_speeds(speeds, rope)
    return speeds


def _llama3_speeds(speeds: Tensor, rope: RopeSpec) -> Tensor:
    """Slow the long waves by `factor`, keep the short ones, blend between.

    Source: Llama 3.1's reference implementation, `apply_scaling`.
    """
    wave_lens = 2 * math.pi / speeds
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = ((rope.original_max_len / wave_lens - low) / (high - low)).clamp(0.0, 1.0)
    return keep * speeds + (1 - keep) * speeds / rope.factor


def rope_tables(
    positions_T: Tensor, speeds: Tensor, rope: RopeSpec, *, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of shape [T, 1, d], as `ops.rotate` wants them: every other sin negated.

    Dimensions that do not turn have an angle of zero.
    """
    angles = (positions_T.to(torch.float32)[:, None] * speeds)[:, None, :]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if not rope.is_interleaved:
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    rest = (0, head_dim - 2 * speeds.numel())
    cos = F.pad(cos.repeat_interleave(2, dim=-1), rest, value=1.0)
    return cos, F.pad(torch.stack((-sin, sin), dim=-1).flatten(-2), rest)
