"""Two revisions side by side: some replicas of the new one, the rest of the one that is proven.

A canary and a paused rollout stand like this. The next step follows from the replicas as they are,
as in `planning/rollout.py`, whose rules hold within each of the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import ceil

from mizzen.operator.planning.rollout import Budget, Replica, Standing, Step, next_step, soonest

_THERE = (Standing.FAILED, Standing.STARTING, Standing.UNREADY, Standing.IN_SERVICE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How many replicas of each revision are wanted."""

    revision: str
    stable: str
    new: int
    old: int


def canary_split(revision: str, stable: str, *, weight: int, desired: int) -> Split:
    """Return the fewest replicas of each that leave none with more than an even share of the load.

    Together they are at most one more than wanted.
    """
    return Split(
        revision=revision,
        stable=stable,
        new=ceil(desired * weight / 100),
        old=ceil(desired * (100 - weight) / 100),
    )


def paused_split(replicas: Iterable[Replica], revision: str, stable: str, *, desired: int) -> Split:
    """Return the split in which the new revision gets no further replica."""
    there = sum(r.revision == revision and r.standing in _THERE for r in replicas)
    new = min(there, desired)
    return Split(revision=revision, stable=stable, new=new, old=desired - new)


def split_step(
    replicas: Sequence[Replica], *, split: Split, desired: int, budget: Budget, now: datetime
) -> Step:
    """Return the most that `budget` allows now towards the split."""
    new = [r for r in replicas if r.revision == split.revision]
    rest = [r for r in replicas if r.revision != split.revision]
    serving = sum(r.standing is Standing.IN_SERVICE for r in new)
    # A proven replica goes only when a new one answers in its place.
    old = max(split.old, min(desired, split.new + split.old) - min(serving, split.new))
    of_new = next_step(new, revision=split.revision, desired=split.new, budget=budget, now=now)
    of_rest = next_step(rest, revision=split.stable, desired=old, budget=budget, now=now)
    gone = {*of_new.remove, *of_rest.remove}
    held = sum(r.standing is not Standing.LEAVING and r not in gone for r in replicas)
    room = max(split.new + split.old, desired + budget.surge) - held
    # What is proven comes first: a canary waits until there is room for it.
    create_new = of_new.create[: max(0, room - len(of_rest.create))]
    return Step(
        create=of_rest.create + create_new,
        drain=of_new.drain + of_rest.drain,
        remove=of_new.remove + of_rest.remove,
        look_again_after_s=soonest(of_new.look_again_after_s, of_rest.look_again_after_s),
    )
