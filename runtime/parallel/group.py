"""The ranks of one stage and their collectives. Knows tensors and bytes, nothing of models.

A group of one rank does nothing at all, so single-rank code pays nothing and needs no branch.
The collectives may be used while training; their gradients follow Megatron-LM (Shoeybi et al.,
2019, section 3): `copy` is its f, `all_reduce` its g.
"""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mizzen.runtime.parallel.stages import Stages
from mizzen.runtime.parallel.work import complete, limit_waits


class RankGroup:
    """The ranks that compute a stage of a model together, as seen by one of them.

    Usually a model has one stage, and they are all ranks there are.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        process_group: Any = None,
        stages: Stages | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.stages = stages or Stages(rank=rank, size=size, process_group=process_group)
        self._process_group = process_group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the ranks, the same on each; may reuse `x`'s memory."""
        if self.size == 1:
            return x
        if x.requires_grad and torch.is_grad_enabled():
            return _AllReduce.apply(x, self)
        return self._sum_in_place(x.contiguous())

    def largest(self, x: Tensor) -> Tensor:
        """Return the largest of the ranks' `x`, element by element; reuses `x`'s memory."""
        # Where a model is only planned, there is no number to agree on, and nobody to ask.
        if self.size > 1 and not x.is_meta:
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MAX
            self._run(lambda group: group.allreduce([x], options))
        return x

    def copy(self, x: Tensor) -> Tensor:
        """Return `x`; its gradient is summed over the ranks, for each used it in its own way."""
        if self.size == 1 or not (x.requires_grad and torch.is_grad_enabled()):
            return x
        return _Copy.apply(x, self)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the ranks' `x`, equal in shape, joined along the last dimension."""
        if self.size == 1:
            return x
        if x.requires_grad and torch.is_grad_enabled():
            return _AllGather.apply(x, self)
        return self._gather(x)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite `x` with the source rank's and return it."""
        if self.size > 1:
            options = dist.BroadcastOptions()
            options.rootRank = source
            self._run(lambda group: group.broadcast([x], options))
        return x

    def wait_at_most(self, timeout_s: float) -> None:
        """Take a rank for lost that lets the others wait for so long in later collectives."""
        self.stages.wait_at_most(timeout_s)
        if self.stages.count > 1:
            limit_waits(self._process_group, timeout_s)

    def abort(self) -> None:
        """Break collectives that wait for a rank which is gone; the group is of no more use."""
        self.stages.abort()
        if self.stages.count > 1 and hasattr(self._process_group, "abort"):
            self._process_group.abort()

    def leave(self) -> None:
        """Close the lines: whoever waits for this rank finds it gone. Nothing may be under way."""
        # Gloo closes them with its object, and tensors and hooks may hold on to us for long.
        self._process_group = None
        self.stages.leave()

    def _sum_in_place(self, x: Tensor) -> Tensor:
        self._run(lambda group: group.allreduce([x]))
        return x

    def _gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._run(lambda group: group.allgather([parts], [x]))
        return torch.cat(parts, dim=-1)

    def _run(self, start: Callable[[Any], Any]) -> None:
        complete(self.stages.rank, lambda: start(self._process_group))


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        return group._sum_in_place(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group._sum_in_place(grads[0].clone(memory_format=torch.contiguous_format)), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        return group._gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every rank computes the same loss from the joined tensor, so its own slice of the
        # gradient is already whole: summing would count it once per rank.
        return grads[0].narrow(-1, ctx.group.rank * ctx.width, ctx.width), None
