"""Which replicas to create, drain and remove now, from nothing but what is there.

The next step follows from the replicas as they stand: no memory, no clock of its own. So a
restarted operator goes on where the last one stopped, and a test can walk through whole rollouts.
Must not know pods: what makes a replica ready or lost is decided in `planning/replicas.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import IntEnum

_FIRST_WAIT_S = 10
_LONGEST_WAIT_S = 300
# A scheduler that found no place for so long will find none before another replica has gone.
_NO_ROOM_AFTER_S = 60


class Standing(IntEnum):
    """Where a replica stands. The order is the order of going first when one must go."""

    LOST = 0  # its node is gone, or a rank of it is: no use waiting
    FAILED = 1  # its processes ended; a new one is made after a back-off
    STARTING = 2  # never served anybody
    UNREADY = 3  # served before and may still have requests in flight
    IN_SERVICE = 4
    DRAINING = 5  # takes no new requests, and goes when the last one has ended
    LEAVING = 6  # deleted, its processes may still be ending


# Those that are there for the wanted number.
COUNTS = (Standing.FAILED, Standing.STARTING, Standing.UNREADY, Standing.IN_SERVICE)
_MAY_HAVE_REQUESTS = (Standing.UNREADY, Standing.IN_SERVICE)
_HOLDS_DEVICES = (*_MAY_HAVE_REQUESTS, Standing.DRAINING)


@dataclass(frozen=True, slots=True)
class Replica:
    """One whole copy of the model: a group of pods seen as one thing."""

    slot: int
    revision: str
    standing: Standing
    restarts: int = 0  # failures in a row before this one was made
    failed_at: datetime | None = None
    is_given_up: bool = False  # failed too often: stays as it is, for people to look at
    unplaced_since: datetime | None = None  # no node has room for it
    born: str = ""  # the revision its pods are named after, where that is another
    is_unsure: bool = False  # was told to take other weights, and nobody knows whether it has

    @property
    def place(self) -> tuple[str, int]:
        """What names it, wherever it stands."""
        return self.revision, self.slot


@dataclass(frozen=True, slots=True)
class Budget:
    """How far a rollout may go above and below the wanted number."""

    surge: int = 1
    unavailable: int = 0


@dataclass(frozen=True, slots=True)
class Creation:
    """A replica to make; it may take the place of a failed one."""

    slot: int
    revision: str
    replaces: Replica | None = None

    @property
    def restarts(self) -> int:
        """Failures in a row that led here."""
        return 0 if self.replaces is None else self.replaces.restarts + 1


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now; an empty step means wait."""

    create: tuple[Creation, ...] = ()
    drain: tuple[Replica, ...] = ()  # take out of service, then let the last request end
    remove: tuple[Replica, ...] = ()  # delete now: nobody is served by it
    look_again_after_s: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done."""
        return not (self.create or self.drain or self.remove)


def next_step(
    replicas: Iterable[Replica], *, revision: str, desired: int, budget: Budget, now: datetime
) -> Step:
    """Return the most that `budget` allows now.

    Where a new replica finds no place for a while, the surge gives way: one old replica goes first,
    unless it is the only one.
    """
    everyone = sorted(replicas, key=lambda r: (r.slot, r.revision))
    unplaced_s = _unplaced_s(everyone, revision=revision, now=now) if desired > 1 else None
    if unplaced_s is not None and unplaced_s >= _NO_ROOM_AFTER_S:
        budget = replace(budget, unavailable=max(1, budget.unavailable))
    lost = [r for r in everyone if r.standing is Standing.LOST]
    counted, due = _current(everyone, revision=revision, now=now)
    excess, kept = _split_excess(counted, len(counted) - desired)
    old = [r for r in everyone if r.revision != revision and r.standing is not Standing.LOST]
    go = [*lost, *due, *excess, *_old_that_goes(old, kept, desired=desired, budget=budget)]
    # An old replica that drains still holds its devices: it counts until it has gone, else a
    # rollout would need more of them than the budget says.
    held = len(kept) + sum(r.standing in _HOLDS_DEVICES for r in old)
    room = desired + max(budget.surge, int(budget.unavailable == 0)) - held
    create = max(0, min(desired - len(kept), room))
    return Step(
        create=_creations(create, everyone, revision=revision, due=due),
        drain=tuple(r for r in go if r.standing in _MAY_HAVE_REQUESTS),
        remove=tuple(r for r in go if r.standing not in _MAY_HAVE_REQUESTS),
        look_again_after_s=soonest(
            _next_retry_s(kept, now=now),
            None if unplaced_s is None or not old else max(0.0, _NO_ROOM_AFTER_S - unplaced_s),
        ),
    )


def soonest(*waits_s: float | None) -> float | None:
    """Return the shortest of the waits, None where there is none."""
    return min((wait_s for wait_s in waits_s if wait_s is not None), default=None)


def retry_wait_s(restarts: int) -> int:
    """Return how long a failed replica waits for its successor: twice as long each time."""
    return min(_LONGEST_WAIT_S, _FIRST_WAIT_S << min(restarts, 10))


def _current(
    everyone: Sequence[Replica], *, revision: str, now: datetime
) -> tuple[list[Replica], list[Replica]]:
    """Return the replicas that count for the wanted revision, and the failed ones due a successor.

    A failed replica counts until its back-off is over: so it is neither replaced early, nor does
    the rollout go on around it.
    """
    there = [r for r in everyone if r.revision == revision and r.standing in COUNTS]
    due = [r for r in there if _will_be_retried(r) and _retry_in_s(r, now) <= 0]
    return [r for r in there if r not in due], due


def _split_excess(counted: Sequence[Replica], excess: int) -> tuple[list[Replica], list[Replica]]:
    """Return (who goes, who stays): the least useful first, then the highest slot."""
    ordered = sorted(counted, key=lambda r: (r.standing, -r.slot))
    return ordered[: max(0, excess)], ordered[max(0, excess) :]


def _old_that_goes(
    old: Sequence[Replica], kept: Sequence[Replica], *, desired: int, budget: Budget
) -> list[Replica]:
    """Return the replicas of earlier revisions that need not stay.

    An unready one serves nobody, so it goes at any time. Held to the budget like the others, it
    would block for ever a rollout away from a broken revision.
    """
    unready = [r for r in old if r.standing < Standing.IN_SERVICE]
    serving = [r for r in old if r.standing is Standing.IN_SERVICE]
    ready = len(serving) + sum(r.standing is Standing.IN_SERVICE for r in kept)
    spare = max(0, ready - (desired - budget.unavailable))
    return unready + sorted(serving, key=lambda r: (-r.slot, r.revision))[:spare]


def _creations(
    count: int, everyone: Sequence[Replica], *, revision: str, due: Sequence[Replica]
) -> tuple[Creation, ...]:
    taken = {r.slot for r in everyone if revision in (r.revision, r.born)}
    free = [slot for slot in range(len(taken) + count) if slot not in taken]
    predecessors = [*due, *([None] * count)]
    return tuple(Creation(free[i], revision, predecessors[i]) for i in range(count))


def _next_retry_s(kept: Sequence[Replica], *, now: datetime) -> float | None:
    return min((_retry_in_s(r, now) for r in kept if _will_be_retried(r)), default=None)


def _will_be_retried(replica: Replica) -> bool:
    return replica.standing is Standing.FAILED and not replica.is_given_up


def _unplaced_s(everyone: Sequence[Replica], *, revision: str, now: datetime) -> float | None:
    """Return how long a new replica has waited for a place, None where none waits."""
    waits = [
        (now - r.unplaced_since).total_seconds()
        for r in everyone
        if r.revision == revision and r.standing is Standing.STARTING and r.unplaced_since
    ]
    return max(waits, default=None)


def _retry_in_s(replica: Replica, now: datetime) -> float:
    if replica.failed_at is None:
        return 0.0
    due = replica.failed_at + timedelta(seconds=retry_wait_s(replica.restarts))
    return (due - now).total_seconds()
