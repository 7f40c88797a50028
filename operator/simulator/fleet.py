"""Replicas coming and going on a pool of GPUs, and what that costs; computes no tokens.

A replica holds its GPUs from the moment they are granted until its last request has ended, so
loading and draining are paid for. What nobody holds for a while is lent to fine-tune jobs, which
give it back within a stated time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mizzen.operator.simulator.replica import Replica
from mizzen.operator.simulator.replica_profile import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Lending:
    """How idle GPUs are lent to fine-tune jobs."""

    settle_s: float = 60.0  # a block is lent when nobody took it for so long
    give_back_s: float = 15.0  # from asking until its memory is free
    restart_s: float = 60.0  # of a lease, lost to loading and catching up


@dataclass(slots=True, eq=False)
class Member:
    """A replica and its way through the fleet."""

    replica: Replica
    granted_at: float  # holds its GPUs from here on
    start_s: float  # from asking for it until it serves; infinite for one that never will
    ready_at: float | None = None
    draining_at: float | None = None
    gone_at: float | None = None

    def age_s(self, now: float) -> float:
        """Return how long ago it was asked for."""
        if self.ready_at is not None:
            return now - self.ready_at + self.start_s
        return max(0.0, now - self.granted_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """Replica-hours, by what they were spent on; lent ones are not part of the total."""

    total: float
    loading: float
    draining: float
    lent: float
    lent_useful: float


@dataclass(slots=True)
class Fleet:
    """All replicas of one deployment on a pool that holds `blocks` of them."""

    profile: Profile
    blocks: int
    seed: int = 0
    lending: Lending | None = None
    unstartable: frozenset[int] = frozenset()  # numbers of replicas that never become ready
    itl_tokens: Counter[int] = field(default_factory=Counter)
    members: list[Member] = field(default_factory=list)  # ever
    ready: list[Member] = field(default_factory=list)
    starting: list[Member] = field(default_factory=list)
    draining: list[Member] = field(default_factory=list)
    wanted: int = 0
    leases: int = 0
    _free_since: list[float] = field(default_factory=list)
    _lent_s: float = 0.0
    _lent_useful_s: float = 0.0

    def __post_init__(self) -> None:
        self._free_since = [0.0] * self.blocks

    def begin(self, replicas: int) -> None:
        """Start the simulation with so many replicas in service."""
        self.wanted = replicas
        for _ in range(min(replicas, self.blocks)):
            self._free_since.pop()
            number = len(self.members)
            # It was started before the simulation began, at no cost to it.
            start_s = self.profile.start_up.draw_s(seed=self.seed, replica=number)
            member = self._new_member(granted_at=0.0, start_s=start_s)
            member.ready_at = 0.0
            self.ready.append(member)

    def scale_to(self, wanted: int, now: float) -> list[Member]:
        """Start or drain replicas towards the wanted number; return those that begin to start."""
        self.wanted = wanted
        excess = len(self.ready) + len(self.starting) - wanted
        for _ in range(excess):
            self._remove_one(now)
        return [self._grant(now) for _ in range(min(-excess, len(self._free_since)))]

    def set_ready(self, member: Member, now: float) -> None:
        """A replica has loaded its weights."""
        self.starting.remove(member)
        member.ready_at = now
        self.ready.append(member)

    def set_gone(self, member: Member, now: float) -> None:
        """A replica's processes have ended and its GPUs are free."""
        for group in (self.draining, self.starting, self.ready):
            if member in group:
                group.remove(member)
        member.gone_at = now
        self._free_since.append(now)

    def route(self) -> Member | None:
        """Return the least loaded ready replica, as our gateway chooses; None without one."""
        best: Member | None = None
        least = 1 << 60
        for member in self.ready:
            load = member.replica.in_flight
            if load < least:
                best, least = member, load
        return best

    def close(self, now: float, *, since: float = 0.0) -> Hours:
        """Return what was spent from `since` until now; lent hours are counted from the start."""
        for free_since in self._free_since:
            self._end_lease(free_since, now)
        spent = [_spent(member, since, now) for member in self.members]
        return Hours(
            total=sum(total for total, _, _ in spent) / 3600,
            loading=sum(loading for _, loading, _ in spent) / 3600,
            draining=sum(draining for _, _, draining in spent) / 3600,
            lent=self._lent_s / 3600,
            lent_useful=self._lent_useful_s / 3600,
        )

    def _remove_one(self, now: float) -> None:
        """Drop the replica whose end is felt least: one that never served, else the idlest."""
        if self.starting:
            self.set_gone(self.starting[-1], now)
            return
        member = min(self.ready, key=lambda m: (m.replica.in_flight, -m.replica.number))
        if not member.replica.in_flight:
            self.set_gone(member, now)
            return
        self.ready.remove(member)
        member.draining_at = now
        self.draining.append(member)

    def _grant(self, now: float) -> Member:
        # A block freed a moment ago is not lent yet; of the lent ones the youngest lease loses
        # least. Both are the one that became free last.
        self._free_since.sort()
        give_back_s = self._end_lease(self._free_since.pop(), now)
        number = len(self.members)
        start_s = self.profile.start_up.draw_s(seed=self.seed, replica=number)
        if number in self.unstartable:
            start_s = float("inf")
        member = self._new_member(granted_at=now + give_back_s, start_s=give_back_s + start_s)
        self.starting.append(member)
        return member

    def _new_member(self, *, granted_at: float, start_s: float) -> Member:
        replica = Replica(len(self.members), self.profile, self.itl_tokens)
        member = Member(replica, granted_at=granted_at, start_s=start_s)
        self.members.append(member)
        return member

    def _end_lease(self, free_since: float, now: float) -> float:
        """Count a block's lease, if it had one, and return how long its return takes."""
        if self.lending is None or now - free_since <= self.lending.settle_s:
            return 0.0
        leased_s = now - free_since - self.lending.settle_s
        self.leases += 1
        self._lent_s += leased_s
        self._lent_useful_s += max(0.0, leased_s - self.lending.restart_s)
        return self.lending.give_back_s


def _spent(member: Member, since: float, until: float) -> tuple[float, float, float]:
    """Return the seconds (held, of these loading, of these draining) within a period."""

    def within(start: float | None, end: float | None) -> float:
        if start is None:
            return 0.0
        return max(0.0, min(until if end is None else end, until) - max(start, since))

    return (
        within(member.granted_at, member.gone_at),
        within(member.granted_at, member.gone_at if member.ready_at is None else member.ready_at),
        within(member.draining_at, member.gone_at),
    )
