"""How many of the comparisons of 3.7 (i) a plan wins that knows the whole trace.

    python -m benchmarks.hindsight [--traces DIR] [--only TRACE ...] [--jobs 1] [--rounds 8]

The comparisons are those of `benchmarks.autoscaler`: its baselines, traces and setting. They are
held against the line through the best plans found (`benchmarks.planned_ahead`). In one search
replicas start in no time and cost nothing while they do; in the other they start like everybody's
and are paid for meanwhile, but are wanted ahead. A line is the best that was found: what it wins
can be won, what it does not is not proved to be out of reach.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from multiprocessing import Pool
from pathlib import Path

from benchmarks.autoscaler import (
    OURS,
    SETTING,
    TRACES,
    Run,
    requests_of,
    score,
    starting_at_once,
    swept,
    tuned_elsewhere,
)
from benchmarks.frontier import (
    EQUAL,
    Point,
    attained_for,
    compare,
    frontier,
    hours_for,
)
from benchmarks.planned_ahead import Search

_HALF = 0.5
STARTS = {"in no time": starting_at_once(SETTING), "like everybody's": SETTING}

Lines = dict[str, list[Point]]  # by trace


def best_line(task: tuple[str, str, int]) -> tuple[str, str, list[Point]]:
    starts, trace, rounds = task
    return starts, trace, frontier(Search(requests_of(trace), STARTS[starts]).run(rounds))


def print_ours(ours: dict[str, Point], starts: str, lines: Lines) -> None:
    print(
        f"\nReplicas start {starts}. For what ours attains with its defaults, the best plans need:"
    )
    for trace, point in ours.items():
        hours = _figure(hours_for(lines[trace], point.attainment), "GPU-hours")
        print(f"  {trace:<10}{point.attainment:>7.1%}  {hours} instead of {point.gpu_hours:.1f}")


def print_comparisons(others: Sequence[tuple[Run, Point]], lines: Lines) -> None:
    """Print how many comparisons the lines win, and each that they do not."""
    lost = [
        (said, run, point)
        for run, point in others
        if (said := compare(lines[run.trace], point)) not in ("saves", "serves")
    ]
    low = sum(point.attainment < _HALF for _, point in others)
    low_lost = sum(point.attainment < _HALF for _, _, point in lost)
    print(
        f"  They win {len(others) - len(lost)} of {len(others)} comparisons, of which"
        f" {low - low_lost} of {low} with less than {_HALF:.0%} attained."
    )
    for said, run, point in lost:
        line = lines[run.trace]
        hours = _figure(hours_for(line, point.attainment - EQUAL), "GPU-hours")
        attained = attained_for(line, point.gpu_hours)
        more = _figure(None if attained is None else 100 * attained, "%")
        print(
            f"  {said}: {run.trace}, {run.label} attains {point.attainment:.1%} for"
            f" {point.gpu_hours:.1f}; the plans as much for {hours}, and for as many {more}"
        )


def _figure(value: float | None, unit: str) -> str:
    return "nothing tried" if value is None else f"{value:.1f} {unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--traces", default=os.environ.get("MIZZEN_TRACES", "../shared/data/traces")
    )
    parser.add_argument("--only", nargs="+", choices=TRACES, default=TRACES, help="these traces")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8, help="for each worth of a request")
    arguments = parser.parse_args()
    if not Path(arguments.traces).is_dir():
        sys.exit(f"No traces in {arguments.traces}: set MIZZEN_TRACES to their folder.")
    os.environ["MIZZEN_TRACES"] = arguments.traces
    lines: dict[str, Lines] = {starts: {} for starts in STARTS}
    traces = [trace for trace in TRACES if trace in arguments.only]
    # The longest first, so that two processes end together.
    tasks = [(starts, trace, arguments.rounds) for trace in traces[::-1] for starts in STARTS]
    with Pool(arguments.jobs) as pool:
        reports = {run: report for run, report, _ in pool.imap_unordered(score, swept())}
        for starts, trace, line in pool.imap_unordered(best_line, tasks):
            lines[starts][trace] = line
    points = {run: Point(report.gpu_hours, report.attainment) for run, report in reports.items()}
    ours = {trace: points[Run(trace, OURS, None)] for trace in traces}
    others = [(run, points[run]) for trace in traces for _, run in tuned_elsewhere(reports, trace)]
    for starts in STARTS:
        print_ours(ours, starts, lines[starts])
        print_comparisons(others, lines[starts])


if __name__ == "__main__":
    main()
