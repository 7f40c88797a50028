"""The operator's arbiter on simulated time: the same `lend`, asked as often and about as much.

It looks every few seconds, and at once when a replica is made or a job asks, as the operator's
(`controllers/capacity.py`) does. What it decides takes effect with the delays of real pods.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from math import inf

from mizzen.operator.planning.lending import (
    QueuedJob,
    Snapshot,
    Want,
    lend,
    next_usage,
    reserved_blocks,
)
from mizzen.operator.planning.preemption import Lease
from mizzen.operator.simulator.fleet import Fleet, Member
from mizzen.operator.simulator.jobs import MIX, Job, JobProfile, Lent, count_lent, keep_queue

_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lending:
    """Which jobs borrow idle GPUs, and how long what is said takes to be heard."""

    mix: tuple[JobProfile, ...] = MIX
    reserve: int = 0  # `scaling.reserve`: replicas whose GPUs are never lent
    look_s: float = 5.0  # between two looks, as the operator's configuration has it
    settle_s: float = 0.2  # from a nudge to the look
    notice_s: float = 1.0  # from the look to the job that hears of it: docs/lent-devices.md
    ask_s: float = 1.3  # from a job's exit until it asks anew: the same record


class Arbiter:
    """Jobs that wait and jobs that hold GPUs beside a fleet whose replicas go first."""

    def __init__(self, lending: Lending, fleet: Fleet, *, max_replicas: int, seed: int) -> None:
        self._lending = lending
        self._fleet = fleet
        self._max_replicas = max_replicas
        self.jobs = keep_queue(lending.mix, gpus=fleet.pool.gpus, seed=seed)
        self._looks_at = 0.0
        self._looked_at = 0.0
        self._used_s: dict[str, float] = {}
        self._exits: list[tuple[float, str, Job]] = []
        self._asks: list[tuple[float, str, Job]] = []

    @property
    def wakes_at(self) -> float:
        """When it has something to do, if nothing happens before."""
        return min(
            self._looks_at,
            self._exits[0][0] if self._exits else inf,
            self._asks[0][0] if self._asks else inf,
        )

    def nudge(self, now: float) -> None:
        """Look soon: somebody asks for GPUs."""
        self._looks_at = min(self._looks_at, now + self._lending.settle_s)

    def advance(self, now: float) -> list[Member]:
        """Do what is due; return the replicas that get their GPUs now."""
        while self._exits and self._exits[0][0] <= now:
            at, name, job = heappop(self._exits)
            job.leave(at)
            heappush(self._asks, (at + self._lending.ask_s, name, job))
        while self._asks and self._asks[0][0] <= now:
            heappop(self._asks)[2].is_queued = True
            self.nudge(now)
        return self._look(now) if now >= self._looks_at else []

    def close(self, now: float, *, since: float) -> Lent:
        """Return what lending came to from `since` until now."""
        hours = self._fleet.close(now, since=since)
        pool = self._fleet.pool
        return count_lent(
            self.jobs,
            since=since,
            until=now,
            spare_gpu_hours=pool.gpus * (now - since) / 3600 - hours.total * pool.gang.devices,
            start_waits_s=(
                member.waited_s
                for member in self._fleet.members
                # Those of the beginning never waited.
                if member.granted_at is not None and member.asked_at > since
            ),
        )

    def _look(self, now: float) -> list[Member]:
        self._looks_at = now + self._lending.look_s
        waiting = {str(member.replica.number): member for member in self._fleet.waiting}
        decision = lend(self._snapshot(now), now=_moment(now))
        self._looked_at = now
        for job in self.jobs:
            if job.name in decision.admit:
                job.admit(decision.admit[job.name], now)
            elif job.name in decision.reclaim:
                out_at = job.ask_to_leave(now, notice_s=self._lending.notice_s)
                heappush(self._exits, (out_at, job.name, job))
        let_in = [(waiting[name], nodes) for name, nodes in decision.let_in.items() if nodes]
        for member, nodes in let_in:
            self._fleet.let_in(member, nodes, now)
        return [member for member, _ in let_in]

    def _snapshot(self, now: float) -> Snapshot:
        fleet, pool = self._fleet, self._fleet.pool
        leases = tuple(_lease(job, now) for job in self.jobs if job.nodes)
        self._used_s = next_usage(self._used_s, leases, elapsed_s=now - self._looked_at)
        borrowed = [item for lease in leases for item in lease.devices.items()]
        free = pool.free([*fleet.taken, *borrowed])
        return Snapshot(
            resource="nvidia.com/gpu",
            capacity=pool.capacity,
            held={node: count - free[node] for node, count in pool.capacity.items()},
            leases=leases,
            wants=tuple(
                Want(
                    name=str(member.replica.number),
                    gang=pool.gang,
                    is_gated=True,
                    since=_moment(member.asked_at),
                )
                for member in fleet.waiting
            ),
            reserve=reserved_blocks(
                pool.gang,
                reserve=self._lending.reserve,
                most=self._max_replicas,
                there=len(fleet.present),
            ),
            queue=tuple(_queued(job) for job in self.jobs if job.is_queued),
            used_s=self._used_s,
        )


def _lease(job: Job, now: float) -> Lease:
    lease = job.leases[-1]
    return Lease(
        job=job.name,
        devices={node: job.nodes.count(node) * job.profile.gang.devices for node in set(job.nodes)},
        started_at=_moment(lease.admitted_at),
        is_reclaimable=True,
        is_leaving=lease.asked_at is not None,
        unsaved_s=job.unsaved_s(now),
        yield_s=job.slowest_yield_s or 0.0,
    )


def _queued(job: Job) -> QueuedJob:
    return QueuedJob(
        job=job.name,
        namespace=job.name.partition("/")[0],
        gang=job.profile.gang,
        since=_moment(job.since),
        is_spare=True,
        preemptions=job.preemptions,
        yield_within_s=job.profile.yield_within_s,
        slowest_yield_s=job.slowest_yield_s,
    )


def _moment(at: float) -> datetime:
    return _EPOCH + timedelta(seconds=at)
