"""The one place that says which attention a device's steps use."""

from collections.abc import Callable

from torch import Tensor

from mizzen.runtime.attention.base import PagedBatch
from mizzen.runtime.attention.paged_cpu import PagedCpu
from mizzen.runtime.attention.sdpa import PagedSdpa
from mizzen.runtime.kernels import ops


def paged_attention(cache: Tensor, batch: PagedBatch) -> Callable[..., Tensor]:
    """Return an `Attend` for one step over this cache."""
    if cache.is_cuda:
        # Imported here: torch's builds for CPUs bring no Triton.
        from mizzen.runtime.attention.gpu import gpu_attention  # noqa: PLC0415

        return gpu_attention(cache, batch)
    return PagedCpu(cache, batch) if ops.are_used(cache) else PagedSdpa(cache, batch)
