"""Host memory that is held only where it is used."""

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
