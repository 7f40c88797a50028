"""How fast a device could train at its very best: what measured speed is held against.

Source: the counting of PaLM (Chowdhery et al., 2022), appendix B, without attention's own products.
"""

from __future__ import annotations

import re

import torch

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import Linear

# Dense bfloat16 FLOP/s as NVIDIA's data sheets give them, the more special name first.
_PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10", 125e12),
)
# A multiplication and an addition per weight forwards, as many for the inputs' gradients, and as
# many again for the weights' own, which frozen ones do not have.
_FLOPS_FULL, _FLOPS_FROZEN = 6, 4


def peak_tokens_per_second(
    decoder: Decoder, *, dtype: torch.dtype, is_frozen: bool, workers: int
) -> float | None:
    """Return the speed of all workers at their devices' peak; None where that is not known."""
    device = decoder.place.device
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    peak = find_peak_flops(torch.cuda.get_device_name(device))
    return peak and workers * peak / flops_per_token(decoder, is_frozen=is_frozen)


def find_peak_flops(device_name: str) -> float | None:
    """Return a GPU's dense bfloat16 FLOP/s, None for one that is not in the table."""
    found = (peak for name, peak in _PEAKS if re.search(rf"\b{name}\b", device_name))
    return next(found, None)


def flops_per_token(decoder: Decoder, *, is_frozen: bool) -> int:
    """Return what learning from one token takes, at least. For a group of one rank."""
    weights = sum(
        part.outputs * part.inputs
        for part in decoder.parts()
        # A table that is only read does not multiply.
        if isinstance(part, Linear) and (part is not decoder.embedding or decoder.spec.tied)
    )
    return weights * (_FLOPS_FROZEN if is_frozen else _FLOPS_FULL)
