"""The pods that train one model together: each learns from its share of a step's samples.

`parallelism.tensor` workers hold one copy of the model, each a part; where that is 1, each holds
the whole. All copies move alike: gradients are summed once in a step over those who hold the same
part, and with them travel the loss and the wish to stop, so that all stop after the same step.
Worker 0 leads: its copy alone reads and writes checkpoints and evaluates, and it alone publishes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mizzen.runtime.errors import RankLostError, report_fatal
from mizzen.runtime.parallel.connect import Meeting, connect, open_store
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.line import END, Line
from mizzen.runtime.parallel.nodes import Nodes, meet_followers, reach_leader, read_secret
from mizzen.runtime.parallel.shard import Span, even_span
from mizzen.runtime.train.config import TrainConfig, TrainerEnvironment
from mizzen.runtime.train.stop import StopFlag, YieldRequested, leave

log = logging.getLogger(__name__)

_JOINED, _BEGIN, _STOP = b"joined", b"begin", b"stop"
_LOOK_S = 0.2
# For a leader that is busy writing the last whole step when it hears of the loss.
_LAST_COMMIT_S = 60.0
_BUCKET_ELEMENTS = 16 << 20


class Workers:
    """The group as one worker sees it; a group of one does nothing at all.

    `tensor` are the workers that hold the parts of one copy of the model, `data` those that hold
    the same part of all copies.
    """

    def __init__(
        self,
        *,
        tensor: RankGroup | None = None,
        data: RankGroup | None = None,
        lines: Sequence[Line] = (),
    ) -> None:
        self.tensor = tensor or RankGroup()
        self.data = data or RankGroup()
        self._lines = lines
        self._stop = StopFlag()
        self._heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._has_ended = threading.Event()
        self._is_over = False

    @property
    def is_leader(self) -> bool:
        """Whether this worker reads and writes what the job keeps."""
        return self.is_in_first_copy and self.tensor.rank == 0

    @property
    def is_in_first_copy(self) -> bool:
        """Whether this worker holds a part of the copy that is evaluated and committed."""
        return self.data.rank == 0

    @property
    def copies(self) -> int:
        """How many copies of the model there are."""
        return self.data.size

    def share(self, count: int) -> Span:
        """Return which of a step's `count` items are those of this worker's copy."""
        return even_span(count, rank=self.data.rank, size=self.data.size)

    def watch(self, stop: StopFlag) -> None:
        """Begin to listen to the others, and to tell them when this worker is asked to stop.

        A line's patience stays that of a start: nobody waits for an answer here, and a worker that
        is well can be silent for longer than serving allows while it reads weights.
        """
        self._stop = stop
        for line in self._lines:
            threading.Thread(target=self._listen, args=(line, stop), daemon=True).start()
        if self._lines:
            threading.Thread(target=self._pass_on, args=(stop,), daemon=True).start()

    def join(self, *, tensor: RankGroup, data: RankGroup) -> None:
        """Take the groups; as the leader, return only when the others are in theirs as well."""
        self.tensor, self.data = tensor, data
        if self.is_leader:
            for _ in self._lines:
                self.hear()
        else:
            self.tell(_JOINED)

    @property
    def own_address(self) -> str | None:
        """The address by which the others know this worker; None where there are none."""
        return self._lines[0].own_address if self._lines else None

    def begin(self) -> None:
        """Let the other copies go on; as one of them, wait until they may.

        Nobody waits in a collective, so the first copy may take its time.

        Raises:
            YieldRequested: the leader was asked to stop and is gone.
        """
        if self.is_leader:
            self.tell(_BEGIN)
        while not self.is_in_first_copy:
            is_over = self._has_ended.is_set()  # before looking: its last word came earlier
            try:
                self._heard.get(timeout=_LOOK_S)
                return
            except queue.Empty:
                _ = self._stop.is_asked  # to look is to show that one is alive
                if is_over:
                    raise YieldRequested from None

    def tell(self, message: bytes) -> None:
        """As the leader, say something to all others; as another, to the leader."""
        for line in self._lines:
            line.send(message)

    def hear(self) -> bytes:
        """Wait for the next thing that another says."""
        while True:
            try:
                # Not for ever: a signal is handled only between two calls.
                return self._heard.get(timeout=_LOOK_S)
            except queue.Empty:
                continue

    def wait_for_end(self) -> None:
        """Wait until the leader has no more use for the others."""
        while not self._has_ended.wait(_LOOK_S):
            continue

    def copy_from_leader(self, numbers: Tensor) -> None:
        """Overwrite the numbers with the leader's."""
        if self.is_in_first_copy:
            self.tensor.broadcast(numbers)
        self.data.broadcast(numbers)

    def copy_from_first_copy(self, parts: Sequence[Tensor]) -> None:
        """Overwrite a copy's tensors with the first copy's."""
        for part in parts:
            self.data.broadcast(part)

    def sum_with_gradients(
        self, parameters: Sequence[torch.nn.Parameter], values: Sequence[float]
    ) -> list[float]:
        """Sum each gradient over the copies in place, and a few numbers over all workers.

        Raises:
            RankLostError: another worker is gone; the gradients are of no use.
        """
        if self.data.size > 1:
            values = self._sum_over_copies(parameters, values)
        if self.tensor.size > 1:
            numbers = torch.tensor(values, dtype=torch.float32, device=parameters[0].device)
            values = self.tensor.all_reduce(numbers).tolist()
        return list(values)

    def _sum_over_copies(
        self, parameters: Sequence[torch.nn.Parameter], values: Sequence[float]
    ) -> list[float]:
        for parameter in parameters:
            if parameter.grad is None:  # this worker's samples did not reach it
                parameter.grad = torch.zeros_like(parameter)
        numbers = torch.tensor(values, dtype=torch.float32, device=parameters[0].device)
        for bucket in _buckets([numbers, *(p.grad for p in parameters if p.grad is not None)]):
            flat = self.data.all_reduce(torch.cat([tensor.reshape(-1) for tensor in bucket]))
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        return numbers.tolist()

    def end(self) -> None:
        """Leave the group; the others take it for what it is."""
        self._is_over = True
        for line in self._lines:
            line.end()

    def _listen(self, line: Line, stop: StopFlag) -> None:
        while True:
            try:
                kind, message = line.receive()
            except RankLostError as error:
                self._lose(error, stop)
                return
            if kind == END:
                self._has_ended.set()
                return
            if message == _STOP:
                stop.ask()
            else:
                self._heard.put(message)

    def _pass_on(self, stop: StopFlag) -> None:
        """Hurry the others: they would hear of it only at the end of the step."""
        stop.wait()
        for line in self._lines:
            try:
                line.send(_STOP)
            except RankLostError as error:
                self._lose(error, stop)

    def _lose(self, error: RankLostError, stop: StopFlag) -> None:
        if self._is_over:
            return
        log.error("%s The generation ends.", error)
        if self.is_leader and not stop.has_nothing_to_lose:
            # A collective ends with the other's connections, and what follows it is a commit.
            # Only where these stay, as those of a stopped process do, it would wait on.
            for group in (self.tensor, self.data):
                group.abort()
            time.sleep(_LAST_COMMIT_S)
        leave(report_fatal(error))


def meet(
    config: TrainConfig, environment: TrainerEnvironment, device: torch.device, stop: StopFlag
) -> Workers:
    """Find the other workers of this generation, and listen to them from then on.

    Raises:
        RankLostError: not all of them came in time.
        NodesDisagreeError: another was started for another generation.
        SecretMissingError: the token that proves who belongs to it cannot be read.
    """
    if config.workers == 1:
        return Workers()
    nodes = Nodes(
        count=config.workers,
        index=environment.node_rank,
        leader=environment.master_addr,
        port=environment.master_port,
        host=environment.host,
        secret=read_secret(environment.admin_token_file),
        wait_s=environment.join_seconds,
    )
    agreement = hashlib.sha256(config.model_dump_json(exclude={"admin_port"}).encode()).hexdigest()
    if config.roles == "Ray":
        # Nothing is summed with those that only play roles.
        leads = nodes.index == 0
        lines = meet_followers(nodes, agreement) if leads else [reach_leader(nodes, agreement)]
        workers = Workers(data=RankGroup(rank=nodes.index), lines=lines)
        workers.watch(stop)
        return workers
    # Between two collectives lies at most what the watchdog allows for.
    timeout_s = config.failure.hang_timeout_s
    if nodes.index == 0:
        lines = meet_followers(nodes, agreement)
        own = lines[0].own_address
        store = open_store(own, timeout_s)
        for line in lines:
            line.send(json.dumps([own, store.port]).encode())
        place = (own, store.port)
    else:
        lines = [reach_leader(nodes, agreement)]
        host, port = json.loads(lines[0].receive()[1])
        own, place = lines[0].own_address, (host, port)
    workers = Workers(lines=lines)
    # Whoever joins a group would wait that long for a worker which is gone.
    workers.watch(stop)
    copy, part = divmod(nodes.index, config.parallelism.tensor)

    def join(name: str, *, rank: int, size: int) -> RankGroup:
        if size == 1:
            return RankGroup()
        meeting = Meeting(
            size=size,
            first=rank,
            store=place,
            name=name,
            address=own,
            device=device,
            timeout_s=timeout_s,
        )
        return connect(rank, meeting)

    # The leader's store ends when it returns, and until then somebody may look there.
    workers.join(
        tensor=join(f"copy-{copy}", rank=part, size=config.parallelism.tensor),
        data=join(f"part-{part}", rank=copy, size=config.workers // config.parallelism.tensor),
    )
    return workers


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in groups: an adapter's hundreds cross the network as one."""
    bucket: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if bucket and elements + tensor.numel() > _BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    yield bucket
