"""The threads of torch's OpenMP, which our kernels share work among as well (team.c)."""

import ctypes
from functools import cache
from pathlib import Path

_SOFT = 1  # omp_pause_soft


@cache
def openmp() -> ctypes.CDLL | None:
    """Return the OpenMP runtime that torch has loaded, or None where it is not GNU's."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    mapped = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    # Another package's may be there too; torch's own lies beside it.
    beside_torch = sorted(mapped, key=lambda path: "/torch" not in path)
    return ctypes.CDLL(beside_torch[0]) if beside_torch else None


def dismiss_team() -> None:
    """End the threads that OpenMP keeps ready for the calling one; it gets new ones when it asks.

    Every thread that computes has a team of its own, and the runtime counts them all: with more of
    them than processors, whoever waits for the next work sleeps at once instead of looking out for
    it, and a step's hundreds of kernels begin late, each by about 20 microseconds. So whoever loads
    or trains beside the engine's loop dismisses its own.

    Source: libgomp, `gomp_managed_threads` in team.c and `do_spin` in config/linux/wait.h.
    """
    runtime = openmp()
    if runtime is not None and hasattr(runtime, "omp_pause_resource_all"):
        runtime.omp_pause_resource_all(_SOFT)
