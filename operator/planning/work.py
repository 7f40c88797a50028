"""How much work there is now, in replicas that it would fill, and what that is made of. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mizzen.operator.planning.digits import three_digits as _n
from mizzen.operator.planning.readings import Readings, Sizing
from mizzen.operator.planning.throughput import Capacity


@dataclass(frozen=True, slots=True)
class Work:
    """An amount of work, and its formula for people."""

    replicas: float
    formula: str


def offered_work(readings: Readings, sizing: Sizing) -> Work | None:
    """Return the offered work, None where it is not known."""
    if sizing.capacity is None:
        return _guessed_work(readings, sizing)
    arriving = _arriving_work(readings, sizing.capacity)
    if arriving is None:
        return None
    served = _served_work(readings, sizing)
    is_keeping_up = not readings.waiting and (readings.step_s or 0.0) <= sizing.itl_s
    if served is None:
        return arriving
    return served if is_keeping_up else max(served, arriving, key=lambda work: work.replicas)


def _arriving_work(readings: Readings, capacity: Capacity) -> Work | None:
    if readings.arrivals_per_s is None:
        return None
    replicas = readings.arrivals_per_s / capacity.requests_per_s
    formula = f"{_n(readings.arrivals_per_s)} arriving per s / {_n(capacity.requests_per_s)} each"
    return Work(replicas, formula)


def _served_work(readings: Readings, sizing: Sizing) -> Work | None:
    """Return the work that the engines do, in replicas whose steps take the ITL limit.

    It needs no lengths of requests: those known are of requests that have finished, and the mix
    may have changed since.
    """
    costs, decoded, prefilled = sizing.costs, readings.decoded_per_s, readings.prefilled_per_s
    if costs is None or decoded is None or prefilled is None:
        return None
    seconds = costs.per_sequence_s * decoded + costs.per_prompt_token_s * prefilled
    share = 1 - costs.per_step_s / sizing.itl_s
    formula = (
        f"({_n(decoded)} tokens per s x {_n(1000 * costs.per_sequence_s)} ms + {_n(prefilled)} of "
        f"prompts x {_n(1000 * costs.per_prompt_token_s)} ms) / (1 - "
        f"{_n(1000 * costs.per_step_s)} ms of an empty step / {_n(1000 * sizing.itl_s)} ms ITL)"
    )
    return Work(seconds / share, formula)


def _guessed_work(readings: Readings, sizing: Sizing) -> Work | None:
    """Return the work as long as no capacity is known.

    While nothing waits, replicas whose steps are shorter than the ITL limit have room, however
    many requests they hold: how many they can hold differs several-fold between mixes. Long steps
    alone are no proof of load: an empty replica may be as slow.
    """
    if readings.concurrency is None:
        return None
    each = sizing.concurrency
    by_count = Work(
        readings.concurrency / each,
        f"{_n(readings.concurrency)} in replicas / {_n(each)} each",
    )
    if readings.step_s is None or readings.waiting:
        return by_count
    by_step = Work(
        readings.ready * readings.step_s / sizing.itl_s,
        f"{readings.ready} ready x {_n(1000 * readings.step_s)} ms of a step / "
        f"{_n(1000 * sizing.itl_s)} ms ITL",
    )
    return min(by_count, by_step, key=lambda work: work.replicas)
