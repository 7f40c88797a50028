"""Leader election on one Lease object.

A candidate takes the Lease when it has no holder, or when the holder's renewal did not change for
the Lease's duration by the candidate's own clock: clocks of different machines are never
compared. The leader gives up before others may take over. Kopf has no such thing, and the
client library's version compares wall clocks and stores its record in an annotation.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

logger = logging.getLogger(__name__)

Json = dict[str, Any]


class LeaseApi(Protocol):
    """Access to the Lease object."""

    async def read(self) -> Json | None:
        """Return the Lease, or None where there is none yet."""

    async def write(
        self, spec: Json, *, annotations: dict[str, str], previous: Json | None
    ) -> Json | None:
        """Write the Lease over `previous`; None when somebody else was quicker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTimes:
    """`renew_s` must be shorter than `duration_s`, so that a leader stops before another starts."""

    duration_s: float = 15.0
    renew_s: float = 10.0
    retry_s: float = 2.0


@dataclass(slots=True)
class Lease:
    """This process's view of the election."""

    api: LeaseApi
    identity: str
    times: LeaseTimes = field(default_factory=LeaseTimes)
    wall_clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    _notes: dict[str, str] = field(default_factory=dict)
    _seen: Json | None = None
    _seen_at: float = 0.0
    _renewed_at: float = 0.0
    _is_held: bool = False

    def is_held(self) -> bool:
        """Return whether this process leads now, judged by its own clock."""
        return self._is_held and _now() - self._renewed_at < self.times.renew_s

    def note(self, key: str, text: str) -> None:
        """Have a text go with every renewal, as an annotation, for the leader that follows."""
        self._notes[key] = text

    def noted(self, key: str) -> str:
        """Return what this leader, or the one before it, noted; empty where nobody did."""
        return self._notes.get(key) or _annotations(self._seen).get(key, "")

    def age_s(self) -> float:
        """Return the seconds since the last successful renewal."""
        return _now() - self._renewed_at

    async def acquire(self) -> None:
        """Wait until this process leads."""
        while not await self._try():  # noqa: ASYNC110  # the event is on another machine
            await asyncio.sleep(self.times.retry_s)
        logger.info("leading", extra={"identity": self.identity})

    async def keep(self) -> None:
        """Renew until that fails for too long; returning means this process must stop now."""
        while (left_s := self.times.renew_s - self.age_s()) > 0:
            await asyncio.sleep(min(self.times.retry_s, left_s))
            left_s = self.times.renew_s - self.age_s()
            if not await self._try(within_s=max(0.0, left_s)) and not self._is_held:
                break
        self._is_held = False
        logger.error("lost the lead", extra={"identity": self.identity})

    async def release(self) -> None:
        """Let the next candidate take over at once instead of after the duration."""
        if not self.is_held() or self._seen is None:
            return
        self._is_held = False
        spec = {**self._seen["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            await self._write(spec, previous=self._seen)
        except Exception as error:
            logger.warning("could not release the Lease", extra={"error": str(error)})

    async def _try(self, *, within_s: float = 5.0) -> bool:
        """Take or renew the Lease if that is allowed; return whether it is ours now."""
        asked_at = _now()
        try:
            async with asyncio.timeout(min(within_s, self.times.renew_s / 2)):
                lease = await self._observe()
                if lease is not None and not self._may_take(lease):
                    self._is_held = False
                    return False
                written = await self._write(self._next_spec(lease), previous=lease)
        except Exception as error:
            logger.warning("could not reach the Lease", extra={"error": str(error)})
            return False
        if written is None:
            return False
        self._seen, self._seen_at = written, asked_at
        # Counted from before the request: the server may have stored it at any time since.
        self._renewed_at, self._is_held = asked_at, True
        return True

    async def _write(self, spec: Json, *, previous: Json | None) -> Json | None:
        annotations = _annotations(previous) | self._notes
        return await self.api.write(spec, annotations=annotations, previous=previous)

    async def _observe(self) -> Json | None:
        lease = await self.api.read()
        # The version, not the times in it: an equal renewal is a renewal too.
        if lease is not None and (self._seen is None or _version(lease) != _version(self._seen)):
            self._seen, self._seen_at = lease, _now()
        return lease

    def _may_take(self, lease: Json) -> bool:
        spec = lease["spec"]
        holder = spec.get("holderIdentity") or ""
        duration_s = float(spec.get("leaseDurationSeconds") or self.times.duration_s)
        return holder in ("", self.identity) or _now() - self._seen_at >= duration_s

    def _next_spec(self, lease: Json | None) -> Json:
        now = self.wall_clock().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        old = lease["spec"] if lease else {}
        is_new_holder = old.get("holderIdentity") != self.identity
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": int(self.times.duration_s),
            "acquireTime": now if is_new_holder else old.get("acquireTime", now),
            "renewTime": now,
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + int(is_new_holder),
        }


def _annotations(lease: Json | None) -> dict[str, str]:
    return (lease["metadata"].get("annotations") or {}) if lease else {}


def _version(lease: Json) -> str:
    return str(lease["metadata"]["resourceVersion"])


def _now() -> float:
    return asyncio.get_running_loop().time()
