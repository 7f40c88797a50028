"""What jobs ask of the arbiter and what it last decided: kept in memory, made anew after a restart.

Jobs ask at each reconcile for as long as they wait, so nothing here has to survive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from mizzen.operator.crds.common import Json
from mizzen.operator.engine.key import Key
from mizzen.operator.planning.lending import Hold, QueuedJob, Wait

_NOT_YET = Wait(Hold.COMING, "It is being looked for devices.")
_BLIND = Wait(
    Hold.BLIND,
    "The operator serves single namespaces and has no right to see nodes, so it cannot tell what "
    "is spare. Set spec.spareCapacity.enabled to false, or install the chart for all namespaces.",
)


@dataclass(frozen=True, slots=True)
class Request:
    """A job that wants to start, and which nodes its pods may go to."""

    resource: str
    job: QueuedJob
    node_selector: Mapping[str, str]
    tolerations: tuple[Json, ...]

    @property
    def places(self) -> tuple[object, ...]:
        """What decides which nodes would do; the rest only says when it is its turn."""
        return (self.resource, self.job.gang, self.node_selector, self.tolerations)


@dataclass(slots=True)
class Ledger:
    """Requests of jobs, and the arbiter's answers."""

    # Whether the arbiter may look at nodes; None before its first look.
    sees_nodes: bool | None = False
    requests: dict[Key, Request] = field(default_factory=dict)
    admitted: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)  # hostnames
    waits: Mapping[Key, Wait] = field(default_factory=dict)
    # Resources that jobs hold or want: replicas get theirs from the arbiter too.
    shared: frozenset[str] = frozenset()
    nudged: asyncio.Event = field(default_factory=asyncio.Event)
    # Held by a look and by the making of a job's pods. So a look sees all pods that its earlier
    # answers have led to, and no job starts on devices that a look is giving to somebody else.
    handing_out: asyncio.Lock = field(default_factory=asyncio.Lock)

    def ask(self, key: Key, request: Request) -> Wait | None:
        """Return why the job waits; None where it may start, on the nodes in `admitted` if any."""
        known = self.requests.get(key)
        if known is not None and known.places != request.places:
            self._forget_answer(key)  # it was to another question
        if known != request:
            self.requests[key] = request
            self.nudged.set()
        return self.wait_of(key)

    def offers(self, key: Key, request: Request) -> bool:
        """Whether a job that runs may have some of the pods that it lacks."""
        self.ask(key, request)
        return key in self.admitted

    def answer(
        self,
        asked: Mapping[Key, Request],
        *,
        admitted: Mapping[Key, tuple[str, ...]],
        waits: Mapping[Key, Wait],
    ) -> list[Key]:
        """Keep a look's answers to what was asked; return the jobs for which they are news.

        Who asked for something else during the look is answered by the next one.
        """
        known = {key: request.places for key, request in self.requests.items()}
        holds = {key for key, request in asked.items() if known.get(key) == request.places}
        news = [
            *(key for key in admitted if self.admitted.get(key) != admitted[key]),
            *(key for key in waits if self.waits.get(key) != waits[key]),
        ]
        self.admitted = {key: nodes for key, nodes in admitted.items() if key in holds}
        self.waits = {key: wait for key, wait in waits.items() if key in holds}
        return [key for key in news if key in holds]

    def wait_of(self, key: Key) -> Wait | None:
        """Return why a job waits, None where it may start or has not asked."""
        request = self.requests.get(key)
        if request is None or key in self.admitted:
            return None
        if self.sees_nodes is False:
            # Whoever does not lend may start: the scheduler makes it wait.
            return _BLIND if request.job.is_spare else None
        return self.waits.get(key, _NOT_YET)

    def take(self, key: Key) -> tuple[str, ...]:
        """Return the hostnames that the job was given; it has to ask again for others."""
        hostnames = self.admitted.get(key, ())
        self.requests.pop(key, None)
        self._forget_answer(key)
        return hostnames

    def withdraw(self, key: Key) -> None:
        """Forget that the job asked."""
        if self.requests.pop(key, None) is not None:
            self.nudged.set()
        self._forget_answer(key)

    def _forget_answer(self, key: Key) -> None:
        self.admitted = {k: nodes for k, nodes in self.admitted.items() if k != key}
        self.waits = {k: wait for k, wait in self.waits.items() if k != key}
