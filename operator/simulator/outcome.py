"""All that happened in a simulation, before it is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mizzen.operator.simulator.fleet import Hours
from mizzen.operator.simulator.jobs import Lent
from mizzen.operator.simulator.replica import Flight


@dataclass(frozen=True, slots=True)
class ScaleEvent:
    """The wanted number of replicas changed."""

    at: float
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Moment:
    """One point of the plot."""

    at: float
    wanted: int
    ready: int
    starting: int
    draining: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that happened."""

    flights: list[Flight]
    events: list[ScaleEvent]
    moments: list[Moment]
    itl_tokens: Counter[int]  # tokens by ITL in units of ITL_RESOLUTION_S
    hours: Hours
    lent: Lent | None  # without lending
    cut: int  # streams that a drain did not wait for
    counted_s: float  # without the warm-up
