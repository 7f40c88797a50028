"""The one place that says which attention a device's steps use."""

from torch import Tensor

from mizzen.runtime.attention.base import PagedBatch
from mizzen.runtime.attention.paged_cpu import PagedCpu
from mizzen.runtime.attention.sdpa import PagedSdpa
from mizzen.runtime.kernels import ops


def paged_attention(cache: Tensor, batch: PagedBatch) -> PagedCpu | PagedSdpa:
    """Return an `Attend` for one step over this cache."""
    return PagedCpu(cache, batch) if ops.are_used(cache) else PagedSdpa(cache, batch)
