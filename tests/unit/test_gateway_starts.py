"""When a client is told to come back, by how long starts have taken."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mizzen.runtime.gateway.directory import ObjectKey
from mizzen.runtime.gateway.sinks import parse_model
from mizzen.runtime.gateway.starts import Starts
from tests.fixtures.clock import Clock
from tests.fixtures.gateway_house import MakeHouse, open_houses


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


def test_when_to_come_back_follows_from_measured_starts() -> None:
    clock = Clock()
    starts = Starts(clock)
    key: ObjectKey = ("team", "tiny")
    unknown = starts.left_s(key)
    for took_s in (40, 60):
        starts.note_wanted(key)
        clock.now += took_s
        starts.note_ready(key)
    assert starts.left_s(key) == 60 != unknown
    starts.note_wanted(key)
    clock.now += 50
    assert starts.left_s(key) == 10
    clock.now += 25
    assert starts.left_s(key) == 75


def test_a_start_that_nobody_waits_for_any_more_is_not_measured() -> None:
    clock = Clock()
    starts = Starts(clock)
    key: ObjectKey = ("team", "tiny")
    starts.note_wanted(key)
    clock.now += 1200
    starts.note_wanted(key)  # they come back for a slow one
    clock.now += 1200
    assert starts.running() == [key]
    assert starts.left_s(key) == 900  # and are not sent away for longer and longer
    clock.now += 80_000
    assert starts.running() == []
    starts.note_ready(key)
    assert starts.longest_s(key) is None


def test_a_gateway_that_has_seen_no_start_goes_by_those_the_operator_measured() -> None:
    clock = Clock()
    starts = Starts(clock)
    key: ObjectKey = ("team", "tiny")
    starts.note_wanted(key)
    clock.now += 50
    assert starts.left_s(key, told_s=290.5) == 241
    starts.note_ready(key)
    assert starts.left_s(key, told_s=290.5) == 50  # its own are of the whole way, wake included


async def test_when_to_come_back_is_said_from_what_the_status_tells_of_earlier_starts(
    make_house: MakeHouse,
) -> None:
    learned = {"learned": {"startSeconds": [120, 290.5, "soon"]}}
    item = {
        "metadata": {"namespace": "team", "name": "tiny"},
        "spec": {"scaling": {"min": 0, "max": 3}},
        "status": {"scaling": learned},
    }
    house = await make_house([], hold_timeout_s=0.1)
    house.serve(model=parse_model(item))
    status, _, headers = await house.ask()
    assert status == 503
    assert 230 <= int(headers["Retry-After"]) <= 291
