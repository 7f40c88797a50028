"""What lending idle GPUs to fine-tune jobs costs serving, and what the jobs make of it.

    python -m benchmarks.lending [--traces DIR] [--only TRACE ...] [--seeds 8]
                                 [--reserve 0]

Each trace is replayed against our autoscaler with and without jobs that borrow: the same requests,
and for the n-th replica the same start-up. The pool has just as many GPUs as serving alone held at
its peak, and more jobs wait than it could hold, so each replica that starts has to take GPUs back.
Who gets what is decided by the function that the operator calls (`planning/lending.py`, `lend`). A
replica that starts seconds later changes all that comes after, for better or worse; so each trace
is replayed with several sets of start-up and yield times, and the mean is what counts. The traces
are those of `benchmarks.autoscaler`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from benchmarks.autoscaler import OURS, SETTING, TRACES, requests_of
from mizzen.operator.simulator.arbiter import Lending
from mizzen.operator.simulator.experiment import run_policy
from mizzen.operator.simulator.report import LendingFigures, Report

MOST_POINTS_LOST = 0.5
LEAST_USEFUL = 0.85


@dataclass(frozen=True, slots=True)
class Pair:
    """One trace and one set of start-ups, without lending and with it."""

    off: Report
    on: Report
    pool_gpus: int

    @property
    def points(self) -> float:
        return 100 * (self.on.attainment - self.off.attainment)

    @property
    def lending(self) -> LendingFigures:
        assert self.on.lending is not None
        return self.on.lending


def measure(trace: str, *, seed: int, reserve: int) -> Pair:
    requests = requests_of(trace)
    setting = replace(SETTING, seed=seed)
    outcome, off = run_policy(OURS, requests, setting)
    peak = max(m.ready + m.starting + m.draining for m in outcome.moments)
    lending = replace(setting, max_replicas=peak, lending=Lending(reserve=reserve))
    _, on = run_policy(OURS, requests, lending)
    return Pair(off, on, peak * setting.profile.gpus)


def print_trace(trace: str, pairs: Sequence[Pair]) -> None:
    def average(figure: Callable[[Pair], float]) -> float:
        return mean(map(figure, pairs))

    lent = average(lambda pair: pair.lending.lent_gpu_hours)
    useful = average(lambda pair: pair.lending.useful_gpu_hours)
    spare = average(lambda pair: pair.lending.spare_gpu_hours)
    points = [pair.points for pair in pairs]
    error = stdev(points) / len(points) ** 0.5 if len(points) > 1 else float("nan")
    off, on = average(lambda p: 100 * p.off.attainment), average(lambda p: 100 * p.on.attainment)
    pools = [pair.pool_gpus for pair in pairs]
    print(f"\n{trace}, {min(pools)} to {max(pools)} GPUs, means of {len(pairs)}:")
    print(
        f"  attained {off:.2f} % without, {on:.2f} % with lending: {mean(points):+.2f} points"
        f" (standard error {error:.2f}; {min(points):+.2f} to {max(points):+.2f};"
        f" at least {-MOST_POINTS_LOST})"
    )
    print(f"  of the lent time {100 * useful / lent:.1f} % useful (at least {LEAST_USEFUL:.0%})")
    print(
        f"  GPU-hours: {spare:.1f} spare, {lent:.1f} lent, {useful:.1f} useful; serving "
        f"{average(lambda p: p.off.gpu_hours):.1f} without, {average(lambda p: p.on.gpu_hours):.1f}"
    )
    print(
        f"  {average(lambda p: p.lending.leases):.0f} leases of "
        f"{average(lambda p: p.lending.mean_lease_s):.0f} s,"
        f" {average(lambda p: p.lending.preemptions):.0f} preemptions,"
        f" {average(lambda p: p.lending.fenced):.1f} too slow; a start waits"
        f" {average(lambda p: p.lending.start_wait_s_p50):.1f} s (p95"
        f" {average(lambda p: p.lending.start_wait_s_p95):.1f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--traces", default=os.environ.get("MIZZEN_TRACES", "../shared/data/traces")
    )
    parser.add_argument("--only", nargs="+", choices=TRACES, default=TRACES, help="these traces")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--reserve", type=int, default=0, help="scaling.reserve")
    arguments = parser.parse_args()
    if not Path(arguments.traces).is_dir():
        sys.exit(f"No traces in {arguments.traces}: set MIZZEN_TRACES to their folder.")
    os.environ["MIZZEN_TRACES"] = arguments.traces
    for trace in arguments.only:
        seeds = range(arguments.seeds)
        print_trace(trace, [measure(trace, seed=s, reserve=arguments.reserve) for s in seeds])


if __name__ == "__main__":
    main()
