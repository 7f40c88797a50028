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


@dataclass(slots=True)
class Ledger:
    """Requests of jobs, and the arbiter's answers."""

    # Whether the arbiter may look at nodes; None before its first look.
    sees_nodes: bool | None = False
    requests: dict[Key, Request] = field(default_factory=dict)
    # Hostnames given to jobs whose pods the arbiter has not seen yet.
    started: dict[Key, tuple[Request, tuple[str, ...]]] = field(default_factory=dict)
    admitted: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)  # hostnames
    waits: Mapping[Key, Wait] = field(default_factory=dict)
    # Resources that jobs hold or want: replicas get theirs from the arbiter too.
    shared: frozenset[str] = frozenset()
    nudged: asyncio.Event = field(default_factory=asyncio.Event)

    def ask(self, key: Key, request: Request) -> Wait | None:
        """Return why the job waits; None where it may start, on the nodes in `admitted` if any."""
        if self.sees_nodes is False:
            # Whoever does not lend may start: the scheduler makes it wait.
            return _BLIND if request.job.is_spare else None
        if self.requests.get(key) != request:
            self.requests[key] = request
            self.nudged.set()
        if key in self.admitted:
            return None
        return self.waits.get(key, _NOT_YET)

    def start(self, key: Key, hostnames: tuple[str, ...]) -> None:
        """Note that the job's pods were made, bound to these nodes."""
        request = self.requests.pop(key, None)
        if request is not None and hostnames:
            self.started[key] = (request, hostnames)
        self._forget_answer(key)

    def withdraw(self, key: Key) -> None:
        """Forget that the job asked."""
        if self.requests.pop(key, None) is not None:
            self.nudged.set()
        self._forget_answer(key)

    def _forget_answer(self, key: Key) -> None:
        self.admitted = {k: nodes for k, nodes in self.admitted.items() if k != key}
        self.waits = {k: wait for k, wait in self.waits.items() if k != key}
