"""Looks for the plans of replicas that serve a known trace best, by replaying it again and again.

First come plans of what the arriving work asks for, at several degrees of filling replicas; then
random changes, of which each stretch of the trace keeps those that pay there. What one more request
served as promised is worth, in seconds of a replica, goes from little to much: where it is little,
the requests that are dear to serve are given up.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from benchmarks.frontier import Point
from mizzen.operator.simulator.report import build_report, demand, is_met
from mizzen.operator.simulator.signals import View
from mizzen.operator.simulator.simulation import Setting, simulate
from mizzen.operator.simulator.traces import Request

INTERVAL_S = 10.0
SAMPLE_S = 2.5  # how often the replicas that a stretch pays for are counted
FILLS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)  # of what keeps the ITL
WORTHS_S = (0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 4.0, 8.0, 20.0, 60.0)
STRETCHES = (4, 6, 12, 24, 48)  # intervals

Plan = tuple[int, ...]  # replicas wanted in each interval


@dataclass(slots=True)
class Planned:
    """Wants what the plan says, whatever it sees."""

    plan: Plan
    name: str = "planned"
    interval_s: float = INTERVAL_S
    scrape_s: float = SAMPLE_S
    window_s: float = INTERVAL_S

    def wanted(self, view: View) -> int:
        """Return the plan's number for the interval that begins now."""
        return self.plan[min(len(self.plan) - 1, int(view.now / INTERVAL_S))]


@dataclass(frozen=True, slots=True)
class Tried:
    """A plan and what it did, in all and by interval."""

    plan: Plan
    point: Point
    met: list[int]  # requests, by arrival
    missed: list[int]
    replica_s: list[float]

    def gain_s(self, worth_s: float, stretch: slice = slice(None)) -> float:
        """Return what was gained in replica-seconds, were each request met worth so many."""
        return worth_s * sum(self.met[stretch]) - sum(self.replica_s[stretch])


@dataclass(slots=True)
class Search:
    """The plans of one trace that were tried, and how the next are made."""

    requests: Sequence[Request]
    setting: Setting
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    tried: list[Tried] = field(default_factory=list)

    def run(self, rounds: int) -> list[Point]:
        """Return what every plan cost and attained, with so many rounds for each worth."""
        firsts = [self.attempt(plan) for plan in self.first_plans()]
        for worth_s in WORTHS_S:
            best = max(self.tried, key=lambda tried: tried.gain_s(worth_s))
            for turn in range(rounds):
                stretches = self.cut(self.chance.choice(STRETCHES))
                others = [self.attempt(self.vary(best, stretches))] if turn % 4 else firsts
                mixed = self.attempt(mix([best, *others], stretches, worth_s))
                best = max(best, *others, mixed, key=lambda tried: tried.gain_s(worth_s))
        return [tried.point for tried in self.tried]

    def attempt(self, plan: Plan) -> Tried:
        """Replay the trace with a plan."""
        setting = replace(self.setting, initial_replicas=plan[0])
        objective, gpus = setting.objective, setting.profile.gpus
        outcome = simulate(self.requests, Planned(plan), setting)
        report = build_report(outcome, policy="planned", objective=objective, gpus=gpus)
        size = len(plan)
        point = Point(report.gpu_hours, report.attainment)
        tried = Tried(plan, point, met=[0] * size, missed=[0] * size, replica_s=[0.0] * size)
        for flight in outcome.flights:
            counts = tried.met if is_met(flight, objective) else tried.missed
            counts[min(size - 1, int(flight.request.arrival_s / INTERVAL_S))] += 1
        for moment in outcome.moments:
            if moment.at >= setting.warm_up_s:
                held = moment.ready + moment.starting + moment.draining
                tried.replica_s[min(size - 1, int(moment.at / INTERVAL_S))] += held * SAMPLE_S
        self.tried.append(tried)
        return tried

    def first_plans(self) -> list[Plan]:
        """Return the fewest replicas throughout, and what the arriving work asks for."""
        setting, ahead = self.setting, self.ahead
        work = demand(self.requests, setting.profile, setting.objective, bin_s=INTERVAL_S)
        peaks = [max(arriving for _, arriving in work[i : i + ahead + 1]) for i in range(len(work))]
        filled = [tuple(self.bound(ceil(peak / fill)) for peak in peaks) for fill in FILLS]
        return [(setting.min_replicas,) * len(work), *filled]

    @property
    def ahead(self) -> int:
        """How many intervals a start takes."""
        return ceil(self.setting.profile.start_up.p90_s / INTERVAL_S)

    def bound(self, replicas: int) -> int:
        """Return the nearest number that the setting allows."""
        return max(self.setting.min_replicas, min(self.setting.max_replicas, replicas))

    def cut(self, length: int) -> list[slice]:
        """Cut the trace into stretches of so many intervals, the first of a random length."""
        size = len(self.tried[0].plan)
        first = -self.chance.randrange(length)
        return [slice(max(0, i), min(size, i + length)) for i in range(first, size, length)]

    def vary(self, best: Tried, stretches: Sequence[slice]) -> Plan:
        """Change a part of each stretch: fewer replicas, or more where requests missed."""
        plan = list(best.plan)
        for stretch in stretches:
            begin = self.chance.randrange(stretch.start, stretch.stop)
            end = min(stretch.stop, begin + self.chance.randint(1, stretch.stop - stretch.start))
            is_short = any(best.missed[begin : end + self.ahead])
            sign = 1 if is_short and self.chance.random() < 0.5 else -1
            share = self.chance.choice((0.0, 0.0, 0.3, 1.0))
            for i in range(begin, end):
                plan[i] = self.bound(plan[i] + sign * max(1, round(share * plan[i])))
        return tuple(plan)


def mix(tried: Sequence[Tried], stretches: Sequence[slice], worth_s: float) -> Plan:
    """Return for each stretch what gained most there."""
    return tuple(
        replicas
        for stretch in stretches
        for replicas in max(tried, key=lambda one: one.gain_s(worth_s, stretch)).plan[stretch]
    )
