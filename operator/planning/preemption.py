"""Which jobs give their devices back, so that a gang finds a place. Pure.

What would be free is tried out before anybody is asked: a job that leaves without making room for
the gang has lost its time for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from mizzen.operator.planning.placement import Gang, freed, place

# Loading the model again and finding the place in the data, until the first step.
_RESTART_S = 60.0
# Younger than this a job is not stopped for another job. For serving it always is.
MIN_RUN = timedelta(minutes=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Devices that a job holds, by node, and what it would lose with them."""

    job: str
    devices: Mapping[str, int]
    started_at: datetime
    is_reclaimable: bool
    is_leaving: bool = False
    priority: int = 0
    unsaved_s: float = 0.0  # worked since its last checkpoint
    yield_s: float = 0.0  # how long it needs to leave

    @property
    def cost(self) -> float:
        """Device-seconds that are lost when it is stopped now."""
        return (self.unsaved_s + self.yield_s + _RESTART_S) * sum(self.devices.values())


def protected_from_jobs(lease: Lease, *, now: datetime) -> bool:
    """Whether it runs for so short a time that no other job may end it."""
    return now - lease.started_at < MIN_RUN


def choose_victims(
    gang: Gang,
    free: Mapping[str, int],
    leases: Iterable[Lease],
    *,
    limit: Mapping[str, int] | None = None,
) -> tuple[Lease, ...] | None:
    """Return the cheapest single job that makes room, or a set that loses less than it would.

    Of a set none can be spared. Nobody has to go where there is room. Of equally costly ones the
    newest goes. None where even all of them together are not enough. Of a node the gang gets no
    more devices than its limit, whatever comes free there.
    """

    def fits(gone: Iterable[Lease]) -> bool:
        return place(gang, freed(free, (lease.devices for lease in gone)), limit=limit) is not None

    if fits(()):
        return ()
    by_cost = sorted(
        (lease for lease in leases if lease.is_reclaimable and not lease.is_leaving),
        key=lambda lease: (lease.cost, -lease.started_at.timestamp(), lease.job),
    )
    several = _cheapest_first(by_cost, fits)
    if several is None:
        return None
    alone = next((lease for lease in by_cost if fits([lease])), None)
    # A large job that makes room alone may lose more than the small ones beside it.
    if alone is not None and alone.cost <= sum(lease.cost for lease in several):
        return (alone,)
    return several


def _cheapest_first(
    by_cost: Sequence[Lease], fits: Callable[[Iterable[Lease]], bool]
) -> tuple[Lease, ...] | None:
    chosen: list[Lease] = []
    for lease in by_cost:
        chosen.append(lease)
        if fits(chosen):
            break
    else:
        return None
    for lease in reversed(by_cost):
        others = [other for other in chosen if other is not lease]
        if len(others) < len(chosen) and fits(others):
            chosen = others
    return tuple(chosen)
