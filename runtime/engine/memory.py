"""Host memory that is held only where it is used."""

import ctypes
from math import prod

import numpy as np
import torch
from torch import Tensor


def zeros_when_touched(sides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU that the system backs page by page, on the first write.

    `torch.zeros` writes them all: gigabytes of cache would cost start-up time, and memory that a
    pod with little traffic never needs.
    """
    count = prod(sides) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(sides)


def give_back_freed() -> None:
    """Return freed memory to the system where the C library can.

    glibc keeps what lies between blocks in use. Packing a model's matrices one by one leaves many
    such gaps, which would stay as long as the process.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
