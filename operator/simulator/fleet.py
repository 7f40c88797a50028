"""Replicas coming and going on a pool of GPUs, and what that costs; computes no tokens.

A replica holds its GPUs from the moment they are granted until its last request has ended, so
loading and draining are paid for. Where jobs borrow what is idle, a replica waits until the arbiter
lets it in.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mizzen.operator.planning.placement import place
from mizzen.operator.simulator.pool import Pool
from mizzen.operator.simulator.replica import Replica
from mizzen.operator.simulator.replica_profile import Profile
from mizzen.operator.simulator.routing import LOAD_FACTOR, affinity_key
from mizzen.operator.simulator.traces import Request
from mizzen.runtime.gateway.placement import Load, choose_replica


@dataclass(slots=True, eq=False)
class Member:
    """A replica and its way through the fleet."""

    replica: Replica
    asked_at: float
    load_s: float  # from its GPUs until it serves; infinite for one that never will
    nodes: tuple[str, ...] = ()  # where its GPUs are
    granted_at: float | None = None  # holds its GPUs from here on
    ready_at: float | None = None
    draining_at: float | None = None
    gone_at: float | None = None

    @property
    def waited_s(self) -> float:
        """How long it waited for its GPUs, once it has them."""
        return 0.0 if self.granted_at is None else self.granted_at - self.asked_at

    @property
    def start_s(self) -> float:
        """From asking for it until it serves."""
        return self.waited_s + self.load_s

    def age_s(self, now: float) -> float:
        """Return how long ago it was asked for."""
        if self.ready_at is not None:
            return now - self.ready_at + self.start_s
        return now - self.asked_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """Replica-hours, by what they were spent on."""

    total: float
    loading: float
    draining: float


@dataclass(slots=True)
class Fleet:
    """All replicas of one deployment on a pool of GPUs."""

    profile: Profile
    pool: Pool
    seed: int = 0
    is_gated: bool = False  # whoever starts waits to be let in
    unstartable: frozenset[int] = frozenset()  # numbers of replicas that never become ready
    itl_tokens: Counter[int] = field(default_factory=Counter)
    members: list[Member] = field(default_factory=list)  # ever
    ready: list[Member] = field(default_factory=list)
    starting: list[Member] = field(default_factory=list)
    draining: list[Member] = field(default_factory=list)
    wanted: int = 0

    @property
    def present(self) -> list[Member]:
        """Those that hold GPUs or wait for some."""
        return [*self.ready, *self.starting, *self.draining]

    @property
    def waiting(self) -> list[Member]:
        """Those that nobody has let in yet, the first first."""
        return [member for member in self.starting if member.granted_at is None]

    @property
    def taken(self) -> list[tuple[str, int]]:
        """The nodes where replicas hold GPUs, and how many."""
        gpus = self.pool.gang.devices
        return [(node, gpus) for member in self.present for node in member.nodes]

    def begin(self, replicas: int) -> None:
        """Start the simulation with so many replicas in service."""
        self.wanted = replicas
        for _ in range(min(replicas, self.pool.replicas)):
            # It was started before the simulation began, at no cost to it.
            member = self._new_member(0.0, load_s=self._draw_s())
            self._let_in_where_free(member, 0.0)
            member.ready_at = 0.0
            self.ready.append(member)

    def scale_to(self, wanted: int, now: float) -> list[Member]:
        """Start or drain replicas towards the wanted number; return those that begin to load."""
        self.wanted = wanted
        missing = wanted - len(self.ready) - len(self.starting)
        for _ in range(-missing):
            self._remove_one(now)
        room = self.pool.replicas - len(self.present)
        added = [self._add(now) for _ in range(min(missing, room))]
        if self.is_gated:
            return []
        for member in added:
            self._let_in_where_free(member, now)
        return added

    def let_in(self, member: Member, nodes: tuple[str, ...], now: float) -> None:
        """Give a replica its GPUs."""
        member.nodes = nodes
        member.granted_at = now

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

    def route(self, request: Request) -> Member | None:
        """Return the ready replica for a request, as our gateway chooses; None without one.

        It is the one that the prompt's beginning belongs to, else the least loaded.
        """
        key = affinity_key(request)
        if key is not None and len(self.ready) > 1:
            by_name = {str(member.replica.number): member for member in self.ready}
            loads = [Load(name, member.replica.in_flight) for name, member in by_name.items()]
            chosen = choose_replica(loads, key=key, load_factor=LOAD_FACTOR)
            return by_name[chosen.url] if chosen else None
        best: Member | None = None
        least = 1 << 60
        for member in self.ready:
            load = member.replica.in_flight
            if load < least:
                best, least = member, load
        return best

    def close(self, now: float, *, since: float = 0.0) -> Hours:
        """Return what was spent from `since` until now."""
        spent = [_spent(member, since, now) for member in self.members]
        return Hours(
            total=sum(total for total, _, _ in spent) / 3600,
            loading=sum(loading for _, loading, _ in spent) / 3600,
            draining=sum(draining for _, _, draining in spent) / 3600,
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

    def _add(self, now: float) -> Member:
        number = len(self.members)
        load_s = float("inf") if number in self.unstartable else self._draw_s()
        member = self._new_member(now, load_s=load_s)
        self.starting.append(member)
        return member

    def _draw_s(self) -> float:
        return self.profile.start_up.draw_s(seed=self.seed, replica=len(self.members))

    def _new_member(self, now: float, *, load_s: float) -> Member:
        replica = Replica(len(self.members), self.profile, self.itl_tokens)
        member = Member(replica, asked_at=now, load_s=load_s)
        self.members.append(member)
        return member

    def _let_in_where_free(self, member: Member, now: float) -> None:
        nodes = place(self.pool.gang, self.pool.free(self.taken))
        assert nodes is not None, "nobody is added beyond the pool"
        self.let_in(member, nodes, now)


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
