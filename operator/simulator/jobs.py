"""Fine-tune jobs that borrow GPUs: what a lease brings, and what start and yield cost. No clock.

A job computes nothing here. It holds its GPUs while it loads, makes steps of one length, commits a
checkpoint now and then, and when asked to leave needs a while to commit its last one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import floor

from mizzen.operator.planning.placement import Gang
from mizzen.operator.simulator.replica_profile import StartUp

_RESTART = StartUp(median_s=60.0, p90_s=80.0)
_LEAVE = StartUp(median_s=6.0, p90_s=12.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProfile:
    """What one kind of job needs and how it behaves.

    The default start and yield are what the design allows at most: a median of 60 s from the GPUs
    to the first new step, and 15 s from asking to free GPUs in 95 of 100 cases. What was measured
    is shorter: docs/lent-devices.md.
    """

    name: str
    gang: Gang
    step_s: float = 1.0
    checkpoint_s: float = 120.0  # from one periodic commit to the next
    restart: StartUp = _RESTART  # from its GPUs to the first new step
    leave: StartUp = _LEAVE  # from hearing that it is to go until it did
    yield_within_s: int = 30

    @property
    def gpus(self) -> int:
        """GPUs of all its pods."""
        return self.gang.pods * self.gang.devices


LORA = JobProfile(name="lora", gang=Gang(pods=1, devices=1))
LORA_PAIR = JobProfile(name="lora-pair", gang=Gang(pods=1, devices=2), step_s=2.0)
# All weights, sharded: more to load, more to save.
FULL_GANG = JobProfile(
    name="full-gang",
    gang=Gang(pods=2, devices=4),
    step_s=5.0,
    restart=StartUp(median_s=90.0, p90_s=120.0),
    leave=StartUp(median_s=12.0, p90_s=24.0),
    yield_within_s=60,
)
MIX = (LORA, LORA_PAIR, LORA, FULL_GANG, LORA, LORA_PAIR)


@dataclass(slots=True)
class Lease:
    """GPUs lent to a job once."""

    gpus: int
    admitted_at: float
    working_at: float  # makes its first new step from here on
    asked_at: float | None = None
    out_at: float | None = None
    was_fenced: bool = False

    def kept_until(self, profile: JobProfile, now: float) -> float:
        """Return until when its steps were made and kept.

        The step under way when it is asked is not counted; one that had to be ended where it was
        loses all since its last periodic commit.
        """
        end = now if self.asked_at is None else self.asked_at
        grain = profile.checkpoint_s if self.was_fenced else profile.step_s
        return self.working_at + max(0, floor((end - self.working_at) / grain)) * grain


@dataclass(slots=True, eq=False)
class Job:
    """A job without an end, and all its leases."""

    name: str  # NAMESPACE/NAME
    profile: JobProfile
    chance: random.Random
    since: float = 0.0  # waits since then, if it waits
    is_queued: bool = True
    nodes: tuple[str, ...] = ()
    slowest_yield_s: float | None = None
    leases: list[Lease] = field(default_factory=list)

    @property
    def preemptions(self) -> int:
        """How often it had to leave."""
        return sum(lease.asked_at is not None for lease in self.leases)

    @property
    def lease(self) -> Lease | None:
        """What it holds now."""
        return self.leases[-1] if self.nodes else None

    def admit(self, nodes: tuple[str, ...], now: float) -> None:
        """Give it GPUs."""
        restart_s = self.profile.restart.sample_s(self.chance)
        self.leases.append(Lease(self.profile.gpus, now, now + restart_s))
        self.nodes = nodes
        self.is_queued = False

    def ask_to_leave(self, now: float, *, notice_s: float) -> float:
        """Have it give its GPUs back; return when they are free.

        `notice_s` is the time until the job hears of it.
        """
        assert self.lease is not None
        took_s = notice_s + self.profile.leave.sample_s(self.chance)
        self.since = self.lease.asked_at = now
        self.lease.was_fenced = took_s > self.profile.yield_within_s
        self.slowest_yield_s = max(self.slowest_yield_s or 0.0, took_s)
        return now + min(took_s, self.profile.yield_within_s)

    def leave(self, now: float) -> None:
        """It has gone from its GPUs."""
        self.leases[-1].out_at = now
        self.nodes = ()

    def unsaved_s(self, now: float) -> float:
        """Return how long ago its last commit was, or its start where it has made none."""
        lease = self.leases[-1]
        commits = floor((now - lease.working_at) / self.profile.checkpoint_s)
        last = lease.working_at + commits * self.profile.checkpoint_s
        return now - (last if commits > 0 else lease.admitted_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """What lending came to; hours are GPU-hours."""

    spare_gpu_hours: float  # that no replica held
    lent_gpu_hours: float
    useful_gpu_hours: float  # steps made and kept
    starting_gpu_hours: float
    leaving_gpu_hours: float  # lost steps included
    leases: int
    preemptions: int
    fenced: int  # preemptions that took longer than promised
    mean_lease_s: float
    start_waits_s: tuple[float, ...]  # of replicas, until they were let in; sorted

    @property
    def useful_share(self) -> float:
        """Share of the lent time that made steps which were kept."""
        return self.useful_gpu_hours / self.lent_gpu_hours if self.lent_gpu_hours else 0.0


def keep_queue(mix: Iterable[JobProfile], *, gpus: int, seed: int) -> list[Job]:
    """Return so many jobs, of two namespaces, that some wait however much is spare."""
    kinds = list(mix)
    jobs: list[Job] = []
    asked = 0
    # One round more than the pool holds, so that a job of each kind is there to fill a gap.
    while asked < gpus + sum(kind.gpus for kind in kinds):
        kind = kinds[len(jobs) % len(kinds)]
        namespace = ("search", "support")[len(jobs) % 2]
        name = f"{namespace}/{kind.name}-{len(jobs):03}"
        jobs.append(Job(name, kind, random.Random(f"{seed}/{name}")))
        asked += kind.gpus
    return jobs


def count_lent(
    jobs: Iterable[Job],
    *,
    since: float,
    until: float,
    spare_gpu_hours: float,
    start_waits_s: Iterable[float],
) -> Lent:
    """Return what was lent within a period and what came of it."""
    lent = useful = starting = leaving = 0.0
    held_s: list[float] = []
    asked = fenced = 0

    def within(start: float, end: float) -> float:
        return max(0.0, min(end, until) - max(start, since)) / 3600

    for job in jobs:
        for lease in job.leases:
            out_at = until if lease.out_at is None else lease.out_at
            if out_at <= since:
                continue
            stopped_at = out_at if lease.asked_at is None else lease.asked_at
            started_at = min(lease.working_at, stopped_at)
            kept_until = min(lease.kept_until(job.profile, until), stopped_at)
            lent += lease.gpus * within(lease.admitted_at, out_at)
            starting += lease.gpus * within(lease.admitted_at, started_at)
            useful += lease.gpus * within(started_at, kept_until)
            leaving += lease.gpus * within(kept_until, out_at)
            held_s.append(out_at - lease.admitted_at)
            asked += lease.asked_at is not None and lease.asked_at >= since
            fenced += lease.was_fenced
    return Lent(
        spare_gpu_hours=spare_gpu_hours,
        lent_gpu_hours=lent,
        useful_gpu_hours=useful,
        starting_gpu_hours=starting,
        leaving_gpu_hours=leaving,
        leases=len(held_s),
        preemptions=asked,
        fenced=fenced,
        mean_lease_s=sum(held_s) / max(1, len(held_s)),
        start_waits_s=tuple(sorted(start_waits_s)),
    )
