"""Host memory that is held only where it is used."""

import ctypes
import mmap
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


def untouched_bytes(tensor: Tensor) -> int:
    """Return how much of a tensor on the CPU the system does not back yet.

    Raises:
        OSError: the system does not say.
    """
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    span = tensor.data_ptr() + tensor.nbytes - first
    is_backed = np.zeros(-(-span // mmap.PAGESIZE), dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    at, out = ctypes.c_void_p(first), ctypes.c_void_p(is_backed.ctypes.data)
    if libc.mincore(at, ctypes.c_size_t(span), out) != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return int((is_backed & 1 == 0).sum()) * mmap.PAGESIZE
