"""What the log of past work says about the work to come."""

from __future__ import annotations

import pytest

from mizzen.operator.planning.demand import covering

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
