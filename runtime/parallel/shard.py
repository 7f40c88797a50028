"""Which part of the model a rank holds. Pure arithmetic: every rank computes the same answer."""

from dataclasses import dataclass

from mizzen.runtime.errors import TensorParallelInvalidError


@dataclass(frozen=True, slots=True)
class Span:
    """A contiguous range of rows or columns."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        """The first index after the range."""
        return self.start + self.size


def even_span(total: int, *, rank: int, size: int) -> Span:
    """Return this rank's share of `total`; shares differ by at most one."""
    start, stop = rank * total // size, (rank + 1) * total // size
    return Span(start, stop - start)


@dataclass(frozen=True, slots=True)
class HeadShard:
    """The query heads of one rank and the KV heads they read.

    `queries.size` is always a multiple of `kv.size`, so each local KV head serves the same
    number of local query heads, as attention kernels want it.
    """

    queries: Span
    kv: Span

    @property
    def group(self) -> int:
        """Query heads per KV head on this rank."""
        return self.queries.size // self.kv.size


def head_shard(*, heads: int, kv_heads: int, rank: int, size: int) -> HeadShard:
    """Spread attention heads over ranks, whole KV groups first.

    With at least one KV head per rank, ranks take contiguous KV heads (3 on 2 ranks: 1 and 2) with
    all the query heads that read them. With fewer, each KV head is replicated on the same number
    of ranks, which share out its query heads.

    Raises:
        TensorParallelInvalidError: a rank would have no query head or two halves of KV groups.
    """
    group = heads // kv_heads
    if kv_heads >= size:
        kv = even_span(kv_heads, rank=rank, size=size)
        return HeadShard(Span(kv.start * group, kv.size * group), kv)
    if size % kv_heads or size > heads:
        raise TensorParallelInvalidError(
            f"{heads} query heads over {kv_heads} KV heads cannot be spread over {size} ranks. Set "
            f"spec.parallelism.tensor to at most {kv_heads}, or to a multiple of {kv_heads} "
            f"up to {heads}."
        )
    kv_head, sharer = divmod(rank, size // kv_heads)
    share = even_span(group, rank=sharer, size=size // kv_heads)
    return HeadShard(Span(kv_head * group + share.start, share.size), Span(kv_head, 1))


def check_trainable(*, kv_heads: int, size: int) -> None:
    """Refuse to train where ranks share a KV head: each would see a part of its gradient.

    Raises:
        TensorParallelInvalidError: there are more ranks than KV heads.
    """
    if size > kv_heads:
        raise TensorParallelInvalidError(
            f"Training over {size} ranks needs as many KV heads, and the model has {kv_heads}. "
            f"Set parallelism.tensor to at most {kv_heads}."
        )
