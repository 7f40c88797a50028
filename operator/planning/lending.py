"""Who gets a cluster's devices: replicas first, then jobs, some of them until asked to leave. Pure.

Spare is what nobody holds, less the blocks that are kept free for replicas to come. A job with
`spareCapacity` may have all of it, and gives it back when a replica, or a job that goes before it,
finds no room elsewhere. One that keeps its devices leaves those that replicas had of late: they
are lent, not given away. A job that does with fewer pods starts with as many as find room, and is
offered more once nobody waits for those. One decision is made from one look at the cluster; the
next look shows what came of it, so nothing is remembered in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from mizzen.operator.planning.placement import Gang, Room, capped, count_fitting, freed, place
from mizzen.operator.planning.preemption import Lease, choose_victims, protected_from_jobs

# So long a wait, or one lost lease, lifts a job by one level of priority.
_AGEING_STEP = timedelta(hours=2)
_USAGE_HALF_LIFE_S = 24 * 3600.0
# A job that just left gives a wave of traffic the time to settle before it starts anew.
SETTLE = timedelta(seconds=30)


class Hold(StrEnum):
    """Why a job waits."""

    NO_ROOM = "NoSpareCapacity"
    KEPT = "KeptForReplicas"
    TOO_LARGE = "MoreDevicesThanAnyNode"
    TOO_SLOW = "YieldTooSlow"
    BEHIND = "BehindOlderJob"
    COMING = "WaitsForDevices"
    SETTLING = "Yielded"
    BLIND = "NodesUnknown"
    NO_REPLICA = "NoReplicaToLend"
    IN_QUEUE = "WaitsInQueue"


@dataclass(frozen=True, slots=True)
class Wait:
    """Why a job waits, for programs and for people."""

    hold: Hold
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """A replica whose pods have no node yet; `is_gated` while the scheduler leaves them to us."""

    name: str
    gang: Gang
    is_gated: bool
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedJob:
    """A job that wants to start, or to have more pods than it runs with."""

    job: str
    namespace: str
    gang: Gang  # of as many pods as it can use
    least_pods: int | None = None  # with which it starts already; None: with no fewer
    pods_step: int = 1  # it has a multiple of this
    is_running: bool = False  # without the gang, which is what it lacks
    since: datetime
    is_spare: bool
    priority: int = 0
    preemptions: int = 0
    yield_within_s: int = 0
    slowest_yield_s: float | None = None

    @property
    def least(self) -> Gang:
        """The smallest gang it does with."""
        return self.gang if self.least_pods is None else replace(self.gang, pods=self.least_pods)

    def largest(self, free: Mapping[str, int]) -> Gang:
        """Return the largest gang it can use that finds room there, the least where none does."""
        if self.least_pods is None:
            return self.gang
        fitting = min(self.gang.pods, count_fitting(self.gang, free))
        return replace(self.gang, pods=max(self.least_pods, fitting - fitting % self.pods_step))

    @property
    def is_too_slow(self) -> bool:
        """Whether it has shown that it cannot leave in the time it promises."""
        slowest = self.slowest_yield_s
        return self.is_spare and slowest is not None and slowest > self.yield_within_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One look at everything that holds or wants one resource."""

    resource: str
    capacity: Mapping[str, int]  # devices by node, of nodes that take pods
    held: Mapping[str, int]  # of them, by whatever pod
    # And of these, by pods on their way out that are no lease's.
    returning: Mapping[str, int] = field(default_factory=dict)
    leases: tuple[Lease, ...] = ()
    wants: tuple[Want, ...] = ()
    reserve: tuple[Gang, ...] = ()  # blocks kept free for replicas to come
    surge: tuple[Gang, ...] = ()  # further blocks, which only jobs get that give them back
    queue: tuple[QueuedJob, ...] = ()
    used_s: Mapping[str, float] = field(default_factory=dict)  # device-seconds by namespace


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What follows from one look."""

    # By replica, the node of each of its pods; none where the scheduler shall say what is missing.
    let_in: Mapping[str, tuple[str, ...]]
    reclaim: Mapping[str, str]  # by job, who gets its devices
    # By job, the node of each of its pods; of a job that runs, of each that it may have more.
    admit: Mapping[str, tuple[str, ...]]
    waits: Mapping[str, Wait]  # by job


def reserved_blocks(gang: Gang, *, reserve: int, most: int, there: int) -> tuple[Gang, ...]:
    """Return the blocks kept free for a deployment: never for more replicas than it may have."""
    return (gang,) * max(0, min(reserve, most - there))


def surge_blocks(gang: Gang, *, of_late: int, reserve: int, there: int) -> tuple[Gang, ...]:
    """Return the blocks beyond the reserve for which a deployment had replicas of late."""
    return (gang,) * max(0, of_late - there - reserve)


def lend(snapshot: Snapshot, *, now: datetime) -> Decision:
    """Return who starts, who leaves and who waits."""
    return _Lending(snapshot, now).decide()


def rank(job: QueuedJob, used_s: Mapping[str, float], now: datetime) -> tuple[object, ...]:
    """Return where a job stands in the queue; the smallest goes first.

    Jobs that keep what they get, then priority with age, then whose namespace had least.
    """
    age = int((now - job.since) / _AGEING_STEP) + job.preemptions
    used = used_s.get(job.namespace, 0.0)
    return (job.is_spare, -(job.priority + age), used, job.since, job.job)


def next_usage(
    used_s: Mapping[str, float], leases: Iterable[Lease], *, elapsed_s: float
) -> dict[str, float]:
    """Return each namespace's device-seconds after this time; what lies back counts ever less."""
    fade = 0.5 ** (elapsed_s / _USAGE_HALF_LIFE_S)
    usage = {namespace: seconds * fade for namespace, seconds in used_s.items()}
    for lease in leases:
        namespace = lease.job.partition("/")[0]
        held = sum(lease.devices.values())
        usage[namespace] = usage.get(namespace, 0.0) + held * elapsed_s
    return {namespace: seconds for namespace, seconds in usage.items() if seconds >= 1.0}


class _Lending:
    """One decision under way."""

    def __init__(self, snapshot: Snapshot, now: datetime) -> None:
        self._snapshot = snapshot
        self._now = now
        free = {
            node: max(0, count - snapshot.held.get(node, 0))
            for node, count in snapshot.capacity.items()
        }
        leaving = [lease.devices for lease in snapshot.leases if lease.is_leaving]
        self._room = Room(free, [*leaving, snapshot.returning])
        self._let_in: dict[str, tuple[str, ...]] = {}
        self._reclaim: dict[str, str] = {}
        self._admit: dict[str, tuple[str, ...]] = {}
        self._waits: dict[str, Wait] = {}

    def decide(self) -> Decision:
        for want in sorted(self._snapshot.wants, key=lambda want: (want.since, want.name)):
            self._serve(want)
        for gang in self._snapshot.reserve:
            if self._room.take(gang) is None:
                self._room.reserve(gang)
        self._admit_jobs()
        return Decision(
            let_in=self._let_in, reclaim=self._reclaim, admit=self._admit, waits=self._waits
        )

    def _serve(self, want: Want) -> None:
        nodes = self._room.take(want.gang)
        if nodes is None and self._make_room(want.gang, want.name, self._snapshot.leases):
            return  # its gate stays shut until the devices are there
        if want.is_gated:
            self._let_in[want.name] = nodes or ()

    def _admit_jobs(self) -> None:
        used_s = dict(self._snapshot.used_s)
        waiting = [job for job in self._snapshot.queue if not job.is_running]
        stuck: list[QueuedJob] = []
        while waiting:
            job = min(waiting, key=lambda job: rank(job, used_s, self._now))
            waiting.remove(job)
            wait = self._why_not(job) or self._overtaking(job, stuck) or self._start(job)
            if wait is None:
                # So that of a hundred jobs sent at once not all first ones are one namespace's.
                cost = len(self._admit[job.job]) * job.gang.devices * _AGEING_STEP.total_seconds()
                used_s[job.namespace] = used_s.get(job.namespace, 0.0) + cost
                continue
            self._waits[job.job] = wait
            has_no_room = wait.hold in (Hold.NO_ROOM, Hold.KEPT)
            if has_no_room and self._now - job.since >= _AGEING_STEP:
                stuck.append(job)
        self._offer_more(used_s)

    def _offer_more(self, used_s: Mapping[str, float]) -> None:
        """Offer what nobody waits for to jobs that run and can use it."""
        waiting = [job for job in self._snapshot.queue if job.job in self._waits]
        growing = (job for job in self._snapshot.queue if job.is_running)
        for job in sorted(growing, key=lambda job: rank(job, used_s, self._now)):
            if job.is_too_slow or any(other.gang.meets(job.gang) for other in waiting):
                continue
            self._admit_now(job, self._limit(job))

    def _why_not(self, job: QueuedJob) -> Wait | None:
        resource = self._snapshot.resource
        if job.is_too_slow:
            return Wait(
                Hold.TOO_SLOW,
                f"Once it took the job longer to leave than the {job.yield_within_s} s it "
                "promises, so it gets no spare capacity. Raise "
                "spec.spareCapacity.yieldWithinSeconds, or set spec.spareCapacity.enabled to "
                "false.",
            )
        if place(job.least, self._snapshot.capacity) is None:
            return Wait(
                Hold.TOO_LARGE,
                f"The job asks for {_size(job)} {resource} and the nodes it may run on could "
                "not hold that even if they were empty. Lower "
                "spec.resources.accelerator.count, add nodes, or let it run on more of them: see "
                "nodeSelector and tolerations in spec.podTemplatePatch.",
            )
        if job.is_spare and job.preemptions and self._now - job.since < SETTLE:
            if job.least_pods is not None:
                self._room.reserve(job.least)  # it was to shrink, not to leave
            return Wait(
                Hold.SETTLING,
                "Its devices went back to serving; it goes on from its last checkpoint once some "
                "are free again.",
            )
        return None

    def _overtaking(self, job: QueuedJob, stuck: Iterable[QueuedJob]) -> Wait | None:
        """Return why a job waits behind one of its kind and nodes that found no room for hours.

        Else small jobs would take every device that comes free, and a large one wait for ever.
        Before a job that keeps its devices those may go that give them back.
        """
        ahead = (other for other in stuck if other.is_spare == job.is_spare)
        if not any(other.gang.meets(job.gang) for other in ahead):
            return None
        return Wait(Hold.BEHIND, "A job that has waited for hours for more devices goes first.")

    def _start(self, job: QueuedJob) -> Wait | None:
        """Give the job its devices; return why it waits, if it does."""
        limit = self._limit(job)
        if self._admit_now(job, limit):
            return None
        gang = job.largest(capped(self._room.soon, limit))
        weaker = [
            lease
            for lease in self._snapshot.leases
            if (not job.is_spare or lease.priority < job.priority)
            and not protected_from_jobs(lease, now=self._now)
        ]
        if self._make_room(gang, job.job, weaker, limit=limit):
            return Wait(Hold.COMING, "Other jobs are leaving the devices that it will get.")
        resource = self._snapshot.resource
        if limit is not None and place(job.least, self._spare()) is not None:
            return Wait(
                Hold.KEPT,
                f"The job asks for {_size(job)} {resource} and would not give them back to the "
                "replicas that had them within the last hour. Set spec.spareCapacity.enabled to "
                "true, or lower scaling.max of the deployments, or add nodes. It starts when they "
                "have been idle for an hour.",
            )
        return Wait(
            Hold.NO_ROOM,
            f"The job asks for {_size(job)} {resource} and no node can spare that now. It "
            "starts when replicas or other jobs leave, or nodes are added.",
        )

    def _admit_now(self, job: QueuedJob, limit: Mapping[str, int] | None) -> bool:
        """Give the job the largest gang it can use for which devices are free, if any are."""
        nodes = self._room.take(job.largest(capped(self._room.now, limit)), limit=limit)
        if nodes is not None:
            self._admit[job.job] = nodes
        return nodes is not None

    def _make_room(
        self,
        gang: Gang,
        who: str,
        leases: Iterable[Lease],
        *,
        limit: Mapping[str, int] | None = None,
    ) -> bool:
        """Keep devices that are coming back, and ask for more where those are not enough."""
        if self._room.reserve(gang, limit=limit) is not None:
            return True
        unasked = [lease for lease in leases if lease.job not in self._reclaim]
        victims = choose_victims(gang, self._room.soon, unasked, limit=limit)
        if victims is None:
            return False
        self._reclaim.update({victim.job: who for victim in victims})
        self._room.expect(victim.devices for victim in victims)
        self._room.reserve(gang, limit=limit)
        return True

    def _limit(self, job: QueuedJob) -> dict[str, int] | None:
        """Return how many devices of each node a job may have; None: all that it finds.

        One that does not give them back leaves room for the replicas there were of late, be it free
        or lent to others, who do.
        """
        if job.is_spare or not self._snapshot.surge:
            return None
        left = self._spare()
        for gang in self._snapshot.surge:
            for node in place(gang, left) or ():
                left[node] -= gang.devices
        return left

    def _spare(self) -> dict[str, int]:
        """Return what is free, comes back or can be asked back."""
        lent = (
            lease.devices
            for lease in self._snapshot.leases
            if lease.is_reclaimable and not lease.is_leaving and lease.job not in self._reclaim
        )
        return freed(self._room.soon, lent)


def _size(job: QueuedJob) -> str:
    pods, devices = job.least.pods, job.gang.devices
    size = f"{devices}" if pods == 1 else f"{pods} times {devices}"
    return size if pods == job.gang.pods else f"at least {size}"
