"""Replays a trace against a policy: arrivals, engine steps, scrapes and decisions in one clock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Protocol

from mizzen.operator.planning.signals import ReplicaState
from mizzen.operator.simulator.arbiter import Arbiter, Lending
from mizzen.operator.simulator.fleet import Fleet, Member
from mizzen.operator.simulator.outcome import Moment, Outcome, ScaleEvent
from mizzen.operator.simulator.pool import build_pool
from mizzen.operator.simulator.replica import Flight
from mizzen.operator.simulator.replica_profile import Profile
from mizzen.operator.simulator.signals import ReplicaSample, Sample, View
from mizzen.operator.simulator.traces import Request

_LONGEST_TAIL_S = 3600.0  # after the last arrival; who has no answer by then gets none


class Policy(Protocol):
    """Decides how many replicas there should be; keeps what it remembers, does no I/O."""

    name: str
    interval_s: float  # how often it is asked
    scrape_s: float  # how often its metrics are sampled
    window_s: float  # how far back it looks

    def wanted(self, view: View) -> int:
        """Return the wanted number of replicas; it is clamped to the bounds afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What counts as a well served request: both, the ITL as the request's mean."""

    ttft_s: float = 2.0
    itl_s: float = 0.1
    attainment_ratio: float = 0.95  # of all requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything of a simulation that is neither the trace nor the policy."""

    profile: Profile = field(default_factory=Profile)
    objective: Objective = field(default_factory=Objective)
    min_replicas: int = 1
    max_replicas: int = 32
    initial_replicas: int = 1
    scrape_lag_s: float = 1.0  # from the moment a value is true until a policy can read it
    drain_s: float = 120.0  # a draining replica's streams are cut after this
    lending: Lending | None = None
    gaps: tuple[tuple[float, float], ...] = ()  # no metrics from second to second
    unstartable: frozenset[int] = frozenset()
    warm_up_s: float = 0.0  # simulated, but part of no figure
    seed: int = 0


class RequestTooLargeError(ValueError):
    """A request fits no replica, however empty."""


class _Kind(IntEnum):
    """Order of what happens at the same moment: what ends first, then what looks at it."""

    RUN_ENDS = 0
    READY = 1
    DRAIN_ENDS = 2
    LOOK = 3
    SCRAPE = 4
    DECIDE = 5


def simulate(requests: Sequence[Request], policy: Policy, setting: Setting) -> Outcome:
    """Serve the requests with as many replicas as the policy wants at every moment.

    Raises:
        RequestTooLargeError: a request needs more KV cache than a replica has.
        ValueError: the trace is over before the warm-up is.
    """
    if requests[-1].arrival_s < setting.warm_up_s:
        raise ValueError(
            f"The trace ends after {requests[-1].arrival_s:.0f} s, within the warm-up of "
            f"{setting.warm_up_s:.0f} s."
        )
    largest = max(request.prompt_tokens + request.output_tokens for request in requests)
    if largest > setting.profile.kv_tokens:
        raise RequestTooLargeError(
            f"The trace holds a request of {largest} tokens and a replica's KV cache has "
            f"{setting.profile.kv_tokens}. Simulate a larger replica or cut the trace."
        )
    return _Simulation(requests, policy, setting).run()


class _Simulation:
    def __init__(self, requests: Sequence[Request], policy: Policy, setting: Setting) -> None:
        self.requests = requests
        self.policy = policy
        self.setting = setting
        self.fleet = Fleet(
            setting.profile,
            build_pool(replicas=setting.max_replicas, gpus=setting.profile.gpus),
            seed=setting.seed,
            is_gated=setting.lending is not None,
            unstartable=setting.unstartable,
        )
        self.arbiter = (
            Arbiter(
                setting.lending,
                self.fleet,
                max_replicas=setting.max_replicas,
                seed=setting.seed,
            )
            if setting.lending
            else None
        )
        self.now = 0.0
        self.flights: list[Flight] = []
        self.held: deque[Flight] = deque()
        self.samples: deque[Sample] = deque(
            maxlen=2 + int((policy.window_s + setting.scrape_lag_s) / policy.scrape_s)
        )
        self.unseen: deque[Sample] = deque()  # scraped, but not readable yet
        self.events: list[ScaleEvent] = []
        self.moments: list[Moment] = []
        self.cut = 0
        self._queue: list[tuple[float, int, int, Member | None]] = []
        self._tie = count()
        self._in_flight = 0
        self._in_flight_s = 0.0
        self._in_flight_since = 0.0
        self._totals = Counter[str]()

    def run(self) -> Outcome:
        self.fleet.begin(min(self.setting.initial_replicas, self.setting.max_replicas))
        self._push(0.0, _Kind.SCRAPE)
        self._push(self.policy.interval_s, _Kind.DECIDE)
        self._await_look()
        arrivals = iter(self.requests)
        coming = next(arrivals, None)
        last_s = self.requests[-1].arrival_s
        while coming is not None or self._in_flight:
            at = self._queue[0][0]
            if coming is not None and coming.arrival_s < at:
                self.now = coming.arrival_s
                self._arrive(coming)
                coming = next(arrivals, None)
                continue
            if at > last_s + _LONGEST_TAIL_S:
                break
            self.now, kind, _, member = heappop(self._queue)
            self._happen(_Kind(kind), member)
        since = self.setting.warm_up_s
        return Outcome(
            flights=[f for f in self.flights if f.request.arrival_s >= since],
            events=[event for event in self.events if event.at >= since],
            moments=self.moments,
            itl_tokens=self.fleet.itl_tokens,
            hours=self.fleet.close(self.now, since=since),
            lent=self.arbiter.close(self.now, since=since) if self.arbiter else None,
            cut=self.cut,
            counted_s=self.now - since,
        )

    def _push(self, at: float, kind: _Kind, member: Member | None = None) -> None:
        heappush(self._queue, (at, int(kind), next(self._tie), member))

    def _happen(self, kind: _Kind, member: Member | None) -> None:
        if kind is _Kind.RUN_ENDS:
            assert member is not None
            # A run that was cut has another end by now, and a replica that is gone has none.
            if member.replica.ends_at == self.now and member.gone_at is None:
                self._end_run(member)
        elif kind is _Kind.READY:
            assert member is not None
            if member.gone_at is None:
                self._begin_service(member)
        elif kind is _Kind.DRAIN_ENDS:
            assert member is not None
            if member.gone_at is None:
                self._cut_streams(member)
        elif kind is _Kind.LOOK:
            self._look()
        elif kind is _Kind.SCRAPE:
            self._scrape()
            self._push(self.now + self.policy.scrape_s, _Kind.SCRAPE)
        else:
            self._decide()
            self._push(self.now + self.policy.interval_s, _Kind.DECIDE)

    # --- requests -----------------------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        flight = Flight(request)
        self.flights.append(flight)
        self._totals["requests"] += 1
        self._totals["prompt_tokens"] += request.prompt_tokens
        self._count(+1)
        self._dispatch(flight)

    def _dispatch(self, flight: Flight) -> None:
        member = self.fleet.route(flight.request)
        if member is None:
            self.held.append(flight)
            self._totals["held_prompt_tokens"] += flight.request.prompt_tokens
            return
        before = member.replica.ends_at
        member.replica.submit(flight, self.now)
        if member.replica.ends_at != before:
            self._push_run(member)

    def _push_run(self, member: Member) -> None:
        if member.replica.ends_at is not None:
            self._push(member.replica.ends_at, _Kind.RUN_ENDS, member)

    def _end_run(self, member: Member) -> None:
        first_tokens, finished = member.replica.advance()
        for flight in first_tokens:
            self._totals["ttft"] += 1
            self._totals["ttft_met"] += flight.ttft_s <= self.setting.objective.ttft_s
        for flight in finished:
            self._totals["finished"] += 1
            self._totals["finished_prompt_tokens"] += flight.request.prompt_tokens
            self._totals["finished_output_tokens"] += flight.request.output_tokens
            self._totals["itl_met"] += flight.mean_itl_s <= self.setting.objective.itl_s
        if finished:
            self._count(-len(finished))
        if member.draining_at is not None and not member.replica.in_flight:
            self._leave(member)
            return
        self._push_run(member)

    def _count(self, change: int) -> None:
        self._in_flight_s += self._in_flight * (self.now - self._in_flight_since)
        self._in_flight_since = self.now
        self._in_flight += change

    # --- replicas -----------------------------------------------------------------------------

    def _begin_service(self, member: Member) -> None:
        self.fleet.set_ready(member, self.now)
        self._totals["held_prompt_tokens"] = 0
        waiting, self.held = self.held, deque()
        for flight in waiting:
            self._dispatch(flight)

    def _cut_streams(self, member: Member) -> None:
        self.cut += member.replica.in_flight
        self._count(-member.replica.in_flight)
        self._leave(member)

    def _leave(self, member: Member) -> None:
        self.fleet.set_gone(member, self.now)
        self._scale(self.fleet.wanted)  # its GPUs may be waited for

    def _scale(self, wanted: int) -> None:
        draining = set(self.fleet.draining)
        for member in self.fleet.scale_to(wanted, self.now):
            self._load(member)
        if self.arbiter is not None and self.fleet.waiting:
            self.arbiter.nudge(self.now)
            self._await_look()
        for member in self.fleet.draining:
            if member not in draining:
                self._push(self.now + self.setting.drain_s, _Kind.DRAIN_ENDS, member)

    def _load(self, member: Member) -> None:
        if member.load_s != inf:
            self._push(self.now + member.load_s, _Kind.READY, member)

    def _look(self) -> None:
        # A nudge may have moved what this event was for to an earlier moment.
        if self.arbiter is None or self.arbiter.wakes_at > self.now:
            return
        for member in self.arbiter.advance(self.now):
            self._load(member)
        self._await_look()

    def _await_look(self) -> None:
        if self.arbiter is not None:
            self._push(self.arbiter.wakes_at, _Kind.LOOK)

    # --- what the policy sees and does --------------------------------------------------------

    def _scrape(self) -> None:
        fleet = self.fleet
        self.moments.append(
            Moment(
                self.now, fleet.wanted, len(fleet.ready), len(fleet.starting), len(fleet.draining)
            )
        )
        if any(start <= self.now < end for start, end in self.setting.gaps):
            return
        self._count(0)
        total = self._totals
        self.unseen.append(
            Sample(
                at=self.now,
                requests_total=total["requests"],
                prompt_tokens_total=total["prompt_tokens"],
                finished_total=total["finished"],
                finished_prompt_tokens_total=total["finished_prompt_tokens"],
                finished_output_tokens_total=total["finished_output_tokens"],
                ttft_total=total["ttft"],
                ttft_met_total=total["ttft_met"],
                itl_total=total["finished"],
                itl_met_total=total["itl_met"],
                held=len(self.held),
                held_prompt_tokens=total["held_prompt_tokens"],
                in_flight=self._in_flight,
                in_flight_s_total=self._in_flight_s,
                replicas=tuple(self._sample(member) for member in fleet.ready),
            )
        )

    def _sample(self, member: Member) -> ReplicaSample:
        replica = member.replica
        assert member.ready_at is not None
        return ReplicaSample(
            number=replica.number,
            ready_s=self.now - member.ready_at,
            running=replica.running,
            waiting=len(replica.waiting),
            waiting_prompt_tokens=replica.waiting_tokens,
            kv_tokens=replica.kv_used(self.now),
            kv_capacity=replica.profile.kv_tokens,
            output_tokens_total=replica.output_tokens_by(self.now),
            prefilled_tokens_total=replica.prefilled_tokens,
            prompted_tokens_total=replica.prompted_tokens,
            steps_total=replica.steps_by(self.now),
            step_s_total=replica.step_seconds_by(self.now),
        )

    def _state(self, member: Member) -> ReplicaState:
        is_ready = member.ready_at is not None
        return ReplicaState(
            name=str(member.replica.number),
            age_s=member.age_s(self.now),
            is_ready=is_ready,
            start_s=member.start_s if is_ready else None,
        )

    def _decide(self) -> None:
        readable_until = self.now - self.setting.scrape_lag_s
        while self.unseen and self.unseen[0].at <= readable_until:
            self.samples.append(self.unseen.popleft())
        setting, fleet = self.setting, self.fleet
        view = View(
            now=self.now,
            samples=self.samples,
            ready=len(fleet.ready),
            starting=len(fleet.starting),
            draining=len(fleet.draining),
            min_replicas=setting.min_replicas,
            max_replicas=setting.max_replicas,
            replicas=tuple(self._state(member) for member in (*fleet.ready, *fleet.starting)),
        )
        wanted = self.policy.wanted(view)
        wanted = min(setting.max_replicas, max(setting.min_replicas, wanted))
        if wanted != fleet.wanted:
            self.events.append(ScaleEvent(self.now, fleet.wanted, wanted))
            self._scale(wanted)
