"""The figures of a simulation. Computes, prints nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mizzen.operator.simulator.jobs import Lent
from mizzen.operator.simulator.outcome import Outcome, ScaleEvent
from mizzen.operator.simulator.replica import ITL_RESOLUTION_S, Flight
from mizzen.operator.simulator.replica_profile import Profile
from mizzen.operator.simulator.simulation import Objective
from mizzen.operator.simulator.traces import Request

WINDOW_S = 300.0
REVERSAL_S = 600.0  # two opposite steps within this time are a reversal


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Milliseconds; None where nothing was measured."""

    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class WorstWindow:
    """The five minutes whose requests were served worst."""

    start_s: float
    requests: int
    attainment: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LendingFigures:
    """What jobs made of the GPUs that serving left idle, and what serving waited for them."""

    spare_gpu_hours: float  # that no replica held
    lent_gpu_hours: float
    useful_gpu_hours: float  # of the lent ones, with steps that were made and kept
    useful_share: float
    starting_gpu_hours: float
    leaving_gpu_hours: float
    leases: int
    mean_lease_s: float
    preemptions: int
    fenced: int
    start_wait_s_p50: float
    start_wait_s_p95: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a policy achieved on a trace, and at what cost."""

    policy: str
    requests: int
    attainment: float  # share with TTFT and mean ITL within the objective
    ttft_ms: Percentiles  # by request
    itl_ms: Percentiles  # by token
    gpu_hours: float  # loading and draining included
    gpu_hours_loading: float
    gpu_hours_draining: float
    lending: LendingFigures | None
    scale_events: int
    reversals: int
    reversals_per_hour: float
    worst_five_minutes: WorstWindow
    unfinished: int
    cut_streams: int
    duration_s: float


def build_report(outcome: Outcome, *, policy: str, objective: Objective, gpus: int) -> Report:
    """Return the figures of an outcome."""
    flights, hours = outcome.flights, outcome.hours
    met = sum(is_met(flight, objective) for flight in flights)
    turns = count_reversals(outcome.events)
    return Report(
        policy=policy,
        requests=len(flights),
        attainment=met / len(flights),
        ttft_ms=_ttft_percentiles(flights),
        itl_ms=_itl_percentiles(outcome.itl_tokens),
        gpu_hours=hours.total * gpus,
        gpu_hours_loading=hours.loading * gpus,
        gpu_hours_draining=hours.draining * gpus,
        lending=_lending_figures(outcome.lent) if outcome.lent else None,
        scale_events=len(outcome.events),
        reversals=turns,
        reversals_per_hour=turns / max(outcome.counted_s, 1.0) * 3600,
        worst_five_minutes=worst_window(flights, objective),
        unfinished=sum(flight.finished_at is None for flight in flights),
        cut_streams=outcome.cut,
        duration_s=outcome.counted_s,
    )


def is_met(flight: Flight, objective: Objective) -> bool:
    """Whether a request was served as promised."""
    return flight.ttft_s <= objective.ttft_s and flight.mean_itl_s <= objective.itl_s


def count_reversals(events: Sequence[ScaleEvent]) -> int:
    """Return how often a step was followed by one the other way within ten minutes."""
    return sum(
        (b.after > b.before) != (a.after > a.before) and b.at - a.at < REVERSAL_S
        for a, b in pairwise(events)
    )


def worst_window(flights: Sequence[Flight], objective: Objective) -> WorstWindow:
    """Return the window of WINDOW_S, by arrival, with the lowest attainment."""
    total, met = Counter[int](), Counter[int]()
    for flight in flights:
        window = int(flight.request.arrival_s / WINDOW_S)
        total[window] += 1
        met[window] += is_met(flight, objective)
    worst = min(total, key=lambda window: (met[window] / total[window], window))
    return WorstWindow(worst * WINDOW_S, total[worst], met[worst] / total[worst])


def demand(
    requests: Sequence[Request], profile: Profile, objective: Objective, *, bin_s: float
) -> list[tuple[float, float]]:
    """Return (time, replicas' worth of work that arrived) for each bin.

    A request of I prompt and O output tokens is (b*O + c*I) / (1 - a/S) seconds of a replica that
    keeps its steps at S, the ITL's limit.
    Source: Little's law over the step time of `Profile`.
    """
    share = 1 - profile.step_s / objective.itl_s
    work: dict[int, float] = defaultdict(float)
    for request in requests:
        seconds = (
            profile.step_per_sequence_s * request.output_tokens
            + profile.step_per_prompt_token_s * request.prompt_tokens
        )
        work[int(request.arrival_s / bin_s)] += seconds / max(share, 0.01)
    return [(index * bin_s, work[index] / bin_s) for index in range(max(work) + 1)]


def _lending_figures(lent: Lent) -> LendingFigures:
    waits = lent.start_waits_s

    def wait_s(share: float) -> float:
        return waits[min(len(waits) - 1, int(share * len(waits)))] if waits else 0.0

    return LendingFigures(
        spare_gpu_hours=lent.spare_gpu_hours,
        lent_gpu_hours=lent.lent_gpu_hours,
        useful_gpu_hours=lent.useful_gpu_hours,
        useful_share=lent.useful_share,
        starting_gpu_hours=lent.starting_gpu_hours,
        leaving_gpu_hours=lent.leaving_gpu_hours,
        leases=lent.leases,
        mean_lease_s=lent.mean_lease_s,
        preemptions=lent.preemptions,
        fenced=lent.fenced,
        start_wait_s_p50=wait_s(0.50),
        start_wait_s_p95=wait_s(0.95),
    )


def _ttft_percentiles(flights: Sequence[Flight]) -> Percentiles:
    # Who never got a first token waited longest of all: as infinite, not as absent.
    waits = sorted(flight.ttft_s * 1000 for flight in flights)

    def at(share: float) -> float | None:
        value = waits[min(len(waits) - 1, int(share * len(waits)))]
        return None if value == float("inf") else round(value, 1)

    return Percentiles(at(0.50), at(0.95), at(0.99))


def _itl_percentiles(tokens: Counter[int]) -> Percentiles:
    total = sum(tokens.values())

    def at(share: float) -> float | None:
        seen = 0
        for bucket in sorted(tokens):
            seen += tokens[bucket]
            if seen > share * total:
                return round(bucket * ITL_RESOLUTION_S * 1000, 1)
        return None

    return Percentiles(at(0.50), at(0.95), at(0.99))
