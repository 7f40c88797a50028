"""What the log of past work says about the work to come."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mizzen.operator.planning.demand import covering, record
from mizzen.operator.planning.scale_history import WorkLog
from mizzen.operator.planning.scale_rules import Tuning

LEVELS = {
    "half of steady work lies below its level": ((2, 2, 2, 2), 0.5, 2),
    "a burst that is most of the work counts as most of it": ((1, 1, 1, 1, 16), 0.5, 16),
    "a small share is covered without the burst": ((1, 1, 1, 1, 16), 0.2, 1),
    "all of the work lies below its highest level": ((0.1, 0.2, 0.7), 1.0, 0.7),
    "idle time is no work and moves no level": ((0, 0, 0, 0, 3, 4), 0.4, 3),
    "no work at all needs no level": ((0, 0), 0.95, 0),
}


@pytest.mark.parametrize(("work", "share", "level"), LEVELS.values(), ids=LEVELS)
def test_the_level_that_covers_a_share_of_the_work(
    work: tuple[float, ...], share: float, level: float
) -> None:
    assert covering(work, share) == level


# Work in replicas, one figure per ten seconds.
LOW_WAVE = (0.8,) * 60 + ((4.8,) * 12 + (0.8,) * 42) * 2 + (4.8,) * 12
BURSTS = ((5.0,) + (0.1,) * 5) * 40


def floors(*work: float) -> list[tuple[int, float]]:
    """Return after how many figures a floor for bursts began, and the burst it is for."""
    logs = [WorkLog()]
    for index, level in enumerate((*work, 0.0)):
        logs.append(
            record(logs[-1], level, now_s=10.0 * index, start_s=60.0, promise=0.95, tuning=Tuning())
        )
    return [
        (len(after.buckets), after.burst_floor)
        for before, after in pairwise(logs)
        if after.is_bursty and not before.is_bursty
    ]


CALM = {
    "even": (0.2,) * 360,
    "a request now and then": ((0.2,) + (0.0,) * 5) * 60,
    "none at all": (0.0,) * 360,
}


@pytest.mark.parametrize("calm", CALM.values(), ids=CALM)
def test_calm_after_a_square_wave_begins_no_floor_for_its_tops(calm: tuple[float, ...]) -> None:
    after = [(at, size) for at, size in floors(*LOW_WAVE, *calm) if at > len(LOW_WAVE)]
    # What comes now and then is rough, and may have a floor of its own size.
    assert all(size <= 0.2 for _, size in after)


def test_bursts_begin_a_floor_for_their_size_within_minutes() -> None:
    [(after, size)] = floors(*BURSTS)
    assert after <= 36
    assert size == 5.0


def test_a_floor_begins_after_calm_when_a_burst_is_there_again() -> None:
    calm = (0.2,) * 90
    rough = ((4.8,) + (0.8,) * 5) * 20
    first, size = floors(*LOW_WAVE, *calm, *rough)[0]
    assert first > len(LOW_WAVE) + len(calm)
    assert size == 4.8
