"""New weights inside running replicas, one after the other, instead of new replicas. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime

from mizzen.operator.planning.rollout import (
    Budget,
    Creation,
    Replica,
    Standing,
    Step,
    next_step,
)


def swap_step(
    replicas: Sequence[Replica],
    *,
    revision: str,
    swaps: Collection[str],
    desired: int,
    budget: Budget,
    now: datetime,
) -> tuple[Step, Replica | None]:
    """Return what else is to be done, and the replica whose weights to swap now.

    Replicas of the revisions `swaps` count as if they were of `revision` already: none is replaced
    for being old. One whose slot is taken there by another cannot become the same, and is replaced.
    A replica of `revision` that may have other weights by now is to take its own once more.
    """
    taken = Counter(r.slot for r in replicas if revision in (r.revision, r.born))
    was: dict[tuple[str, int], Replica] = {}
    for replica in replicas:
        is_first = (revision, replica.slot) not in was
        is_free = taken[replica.slot] == int(replica.born == revision)
        is_due = replica.revision in swaps and is_free
        is_back = replica.revision == revision and replica.is_unsure
        if is_first and (is_due or is_back):
            was[revision, replica.slot] = replica
    seen = [replace(r, revision=revision) if r in was.values() else r for r in replicas]
    step = next_step(seen, revision=revision, desired=desired, budget=budget, now=now)
    going = {was.get(r.place, r) for r in (*step.drain, *step.remove)}
    ready = [
        r
        for place, r in sorted(was.items())
        if r.standing is Standing.IN_SERVICE and r not in going
    ]
    return _as_they_are(step, was), next(iter(ready), None)


def _as_they_are(step: Step, was: dict[tuple[str, int], Replica]) -> Step:
    """Return the step with replicas by the revision they still have."""
    return replace(
        step,
        create=tuple(
            Creation(c.slot, c.revision, c.replaces and was.get(c.replaces.place, c.replaces))
            for c in step.create
        ),
        drain=tuple(was.get(r.place, r) for r in step.drain),
        remove=tuple(was.get(r.place, r) for r in step.remove),
    )
