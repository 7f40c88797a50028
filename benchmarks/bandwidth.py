"""How fast this machine reads memory, and how often a decode step must read it.

At one sequence a step has to read every weight once; nothing else of it is as long. So bandwidth
over weight bytes bounds the tokens per second, and the share of it says how well a step is done.
"""

from __future__ import annotations

import math
import time

import torch

_REPEATS = 12


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
