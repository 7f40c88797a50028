"""Plans made with the whole trace known, on a small trace of calm and bursts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.frontier import Point, frontier, hours_for
from benchmarks.planned_ahead import INTERVAL_S, Search, Tried, mix
from mizzen.operator.simulator.experiment import run_policy
from mizzen.operator.simulator.replica_profile import Profile, StartUp
from mizzen.operator.simulator.simulation import Setting
from mizzen.operator.simulator.traces import Request

PROFILE = Profile(
    step_s=0.02,
    step_per_sequence_s=0.0005,
    step_per_prompt_token_s=0.0001,
    gpus=1,
    start_up=StartUp(median_s=0.0, p90_s=0.0),
)
SETTING = Setting(profile=PROFILE, max_replicas=8)
SLOW = replace(SETTING, profile=replace(PROFILE, start_up=StartUp(median_s=40.0, p90_s=50.0)))
CALM = [Request(float(at), 1000, 50) for at in range(400)]
EVEN = [Request(150 + i / 20, 1000, 50) for i in range(400)]
SUDDEN = [Request(300 + i / 90, 1000, 50) for i in range(90)]
REQUESTS = sorted([*CALM, *EVEN, *SUDDEN], key=lambda request: request.arrival_s)


@pytest.mark.parametrize("setting", [SETTING, SLOW], ids=["in no time", "after a while"])
def test_plans_attain_what_every_fixed_size_does_for_fewer_hours(setting: Setting) -> None:
    line = frontier(Search(REQUESTS, setting).run(rounds=1))
    for size in range(2, 7):
        _, fixed = run_policy("static", REQUESTS, setting, target=size)
        hours = hours_for(line, fixed.attainment)
        assert hours is not None
        assert hours < 0.8 * fixed.gpu_hours


@pytest.mark.parametrize("setting", [SETTING, SLOW], ids=["in no time", "after a while"])
def test_a_search_finds_what_one_filling_for_all_bursts_does_not(setting: Setting) -> None:
    search = Search(REQUESTS, setting)
    firsts = len(search.first_plans())
    points = search.run(rounds=1)
    best, first = (hours_for(frontier(some), 1.0) for some in (points, points[:firsts]))
    assert best is not None
    assert first is not None
    assert best < 0.95 * first


def test_what_a_plan_did_by_interval_adds_up_to_what_it_did() -> None:
    search = Search(REQUESTS, SLOW)
    tried = search.attempt(search.first_plans()[4])
    requests = sum(tried.met) + sum(tried.missed)
    assert requests == len(REQUESTS)
    assert sum(tried.met) / requests == pytest.approx(tried.point.attainment)
    assert sum(tried.replica_s) / 3600 == pytest.approx(tried.point.gpu_hours, rel=0.05)


def test_replicas_that_take_a_while_are_wanted_ahead_of_the_burst() -> None:
    at_once, ahead = (Search(REQUESTS, setting).first_plans()[7] for setting in (SETTING, SLOW))
    burst = int(150 / INTERVAL_S)
    assert at_once[burst - 1] == 1 < at_once[burst]
    assert ahead[burst - 6] == 1 < ahead[burst - 5] == ahead[burst]


def tried(plan: tuple[int, ...], *, met: list[int], missed: list[int] | None = None) -> Tried:
    replica_s = [INTERVAL_S * replicas for replicas in plan]
    return Tried(plan, Point(1.0, 1.0), met, missed or [0] * len(plan), replica_s)


def test_each_stretch_keeps_what_gains_most_there() -> None:
    few, many = tried((1, 1, 1, 1), met=[9, 9, 0, 0]), tried((3, 3, 3, 3), met=[9, 9, 9, 9])
    halves = [slice(0, 2), slice(2, 4)]
    assert mix([few, many], halves, worth_s=5.0) == (1, 1, 3, 3)
    assert mix([few, many], halves, worth_s=1.0) == (1, 1, 1, 1)


def test_nothing_is_added_where_nobody_missed_and_the_bounds_hold() -> None:
    search = Search(REQUESTS, replace(SETTING, max_replicas=3), random.Random(1))
    calm = tried((2,) * 40, met=[9] * 40)
    short = tried((3,) * 40, met=[0] * 40, missed=[9] * 40)
    stretches = [slice(i, i + 4) for i in range(0, 40, 4)]
    varied = [search.vary(calm, stretches) for _ in range(20)]
    assert {n for plan in varied for n in plan} == {1, 2}
    assert {n for _ in range(20) for n in search.vary(short, stretches)} == {1, 2, 3}
