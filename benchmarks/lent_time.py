"""How long devices were lent to a job and how much of that it used, from what its pods showed.

A lease is one trainer pod: devices are the job's from the pod's creation to its end. Useful is the
time from when the trainer stood before its first new step until it had made the last one that was
committed when it ended. Loading, the step under way when it is asked to leave, and the last commit
are not, nor is anything where the pod ended without a word.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from mizzen.operator.desired.labels import ADMIN_PORT, JOB, RECLAIMED_AT

_STEP = re.compile(r"^mizzen_train_step (\S+)$", re.MULTILINE)
_LOOK_S = 0.5
Json = dict[str, Any]


@dataclass(slots=True)
class Lease:
    """One stay on lent devices; moments are seconds by one clock."""

    lent_at: float
    first_at: dict[int, float] = field(default_factory=dict)  # when so many steps were first seen
    asked_at: float | None = None  # to leave
    ended_at: float | None = None
    committed: int | None = None  # steps, as its last words say
    address: str = ""

    @property
    def lent_s(self) -> float:
        """How long the devices were lent; 0 while they are."""
        return 0.0 if self.ended_at is None else self.ended_at - self.lent_at

    @property
    def useful_s(self) -> float:
        """How long it made steps that were kept."""
        if self.ended_at is None or self.committed is None or not self.first_at:
            return 0.0
        kept = [at for step, at in self.first_at.items() if step <= self.committed]
        return max(kept) - min(self.first_at.values()) if kept else 0.0

    @property
    def yield_s(self) -> float | None:
        """How long it took from the notice to its end; None where it was not asked to leave."""
        if self.asked_at is None or self.ended_at is None:
            return None
        return self.ended_at - self.asked_at


def useful_pct(leases: Iterable[Lease]) -> float | None:
    """Return how much of a hundred seconds lent was useful, None where nothing was lent."""
    leases = list(leases)
    lent_s = sum(lease.lent_s for lease in leases)
    return 100 * sum(lease.useful_s for lease in leases) / lent_s if lent_s else None


class Leases:
    """The leases of one job, in their order."""

    def __init__(self, job: str, now_s: Callable[[], float]) -> None:
        self._job, self._now_s = job, now_s
        self._by_pod: dict[str, Lease] = {}

    @property
    def all(self) -> list[Lease]:
        """Every lease so far."""
        return list(self._by_pod.values())

    @property
    def open(self) -> list[Lease]:
        """Those that have not ended."""
        return [lease for lease in self.all if lease.ended_at is None]

    def see_pod(self, kind: str, pod: Json) -> None:
        """Take an event of the pods' watch."""
        metadata, status = pod["metadata"], pod.get("status", {})
        if metadata.get("labels", {}).get(JOB) != self._job:
            return
        now_s = self._now_s()
        lease = self._by_pod.setdefault(metadata["uid"], Lease(now_s))
        if lease.ended_at is not None:
            return
        lease.address = status.get("podIP", "")
        if lease.asked_at is None and RECLAIMED_AT in metadata.get("annotations", {}):
            lease.asked_at = now_s
        ends = [c["state"].get("terminated") for c in status.get("containerStatuses", [])]
        if kind == "DELETED" or any(ends):
            lease.ended_at = now_s
            lease.committed = committed_step((ends[0] or {}).get("message", "") if ends else "")

    async def follow_steps(self) -> None:
        """Ask the trainers twice a second how many steps they have made, until cancelled."""
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                for lease in self.open:
                    step = await _ask_step(session, lease.address) if lease.address else None
                    if step is not None:
                        lease.first_at.setdefault(step, self._now_s())
                await asyncio.sleep(_LOOK_S)


def committed_step(last_words: str) -> int | None:
    """Return the step of the last checkpoint that a trainer's termination message tells of."""
    try:
        checkpoint = json.loads(last_words).get("checkpoint") or {}
    except ValueError:
        return None
    step = checkpoint.get("step")
    return step if isinstance(step, int) else None


def step_in(metrics: str) -> int | None:
    """Return how many steps a trainer's metrics tell of, None before its loop stands."""
    found = _STEP.search(metrics)
    return int(float(found[1])) if found else None


async def _ask_step(session: aiohttp.ClientSession, address: str) -> int | None:
    """Return the steps made; one that does not answer tells nothing."""
    try:
        async with session.get(f"http://{address}:{ADMIN_PORT}/metrics") as answer:
            return step_in(await answer.text())
    except (aiohttp.ClientError, TimeoutError):
        return None
