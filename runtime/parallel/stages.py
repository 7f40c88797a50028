"""The stages of a model: each holds a run of its layers and hands what it computed to the next.

Every stage has equally many ranks, numbered stage by stage. Inside a stage they sum (`group.py`),
after which all of them hold the same hidden states; so from stage to stage each rank speaks only
with the one in its own place. What the last stage makes of them goes back to rank 0.

Source: GPipe (Huang et al., 2019), section 2, with one batch at a time.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from mizzen.runtime.errors import PipelineInvalidError
from mizzen.runtime.parallel.shard import Span, even_span
from mizzen.runtime.parallel.work import complete, limit_waits


class Stages:
    """All stages, as seen by one rank of one of them. A lone stage sends nothing."""

    def __init__(
        self, count: int = 1, *, rank: int = 0, size: int = 1, process_group: Any = None
    ) -> None:
        """Say how many there are, which of the `size` ranks of all stages this is, and their lines.

        Args:
            count: How many stages.
            rank: This one, among the ranks of all stages.
            size: Ranks of all stages.
            process_group: Connects all of them; not needed where there is one rank.
        """
        self.count = count
        self.rank = rank
        self.size = size
        self.width = size // count  # ranks of a stage
        self.index, self.place = divmod(rank, self.width)
        self._process_group = process_group

    @property
    def is_first(self) -> bool:
        """Whether tokens enter here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether scores over the vocabulary are made here."""
        return self.index == self.count - 1

    def layers(self, total: int) -> Span:
        """Return which of the model's layers this stage holds; stages differ by at most one.

        Raises:
            PipelineInvalidError: there are fewer layers than stages.
        """
        if total < self.count:
            raise PipelineInvalidError(
                f"The model has {total} layers and cannot be cut into {self.count} stages. Set "
                f"spec.parallelism.pipeline to at most {total}."
            )
        return even_span(total, rank=self.index, size=self.count)

    def receive(self, x: Tensor) -> Tensor:
        """Overwrite `x` with what the stage before sent, and return it."""
        return self._receive(x, self.rank - self.width)

    def send(self, x: Tensor) -> None:
        """Hand `x` to the next stage."""
        self._send(x, self.rank + self.width)

    def take_back(self, x: Tensor) -> Tensor:
        """As rank 0: overwrite `x` with what the last stage gave back, and return it."""
        return self._receive(x, self.size - self.width)

    def give_back(self, x: Tensor) -> None:
        """As the last stage: have its first rank send `x` to rank 0."""
        if self.place == 0:
            self._send(x, 0)

    def least(self, x: Tensor) -> Tensor:
        """Return the least of all ranks' `x`, whatever their stage; reuses its memory."""
        if self.size > 1:
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MIN
            complete(self.rank, lambda: self._process_group.allreduce([x], options))
        return x

    def meet(self, x: Tensor) -> None:
        """Use every line once: NCCL opens each when it is first used, by a store that goes."""
        if self.count == 1:
            return
        self.least(x)
        if not self.is_first:
            self.receive(x)
        if not self.is_last:
            self.send(x)
        if self.is_last:
            self.give_back(x)
        if self.rank == 0:
            self.take_back(x)

    def wait_at_most(self, timeout_s: float) -> None:
        """Take a rank for lost that lets the others wait for so long from now on."""
        limit_waits(self._process_group, timeout_s)

    def abort(self) -> None:
        """Break what waits for a rank that is gone; the lines are of no more use."""
        if hasattr(self._process_group, "abort"):
            self._process_group.abort()

    def leave(self) -> None:
        """Close the lines of this rank, on which nothing may be under way."""
        self._process_group = None

    def _send(self, x: Tensor, to: int) -> None:
        complete(self.rank, lambda: self._process_group.send([x.contiguous()], to, 0))

    def _receive(self, x: Tensor, source: int) -> Tensor:
        complete(self.rank, lambda: self._process_group.recv([x], source, 0))
        return x
