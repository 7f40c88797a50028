"""What one policy can do on one trace: its runs at several settings, and what lies between them.

Research/scaling.md 3.7 compares at equal attainment and at equal GPU-hours. Two runs seldom have
either in common, so the line between two neighbouring runs is read; nothing is read beyond the
outermost ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SAVED_RATIO = 0.85  # of the other's GPU-hours, at equal attainment
SERVED_MORE = 0.05  # attainment, at equal GPU-hours
EQUAL = 0.005  # attainments this close are equal
LOWEST_PROMISE = 0.1  # the least that slo.attainment takes


@dataclass(frozen=True, slots=True)
class Point:
    """One run: what it cost and what it attained."""

    gpu_hours: float
    attainment: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other is at least as good as on both counts, cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.gpu_hours, -p.attainment)):
        if not kept or point.attainment > kept[-1].attainment:
            kept.append(point)
    return kept


def hours_for(line: Sequence[Point], attainment: float) -> float | None:
    """Return the GPU-hours for this attainment or more, None where no run attains as much.

    Less than the cheapest run attains costs what that run does.
    """
    if attainment <= line[0].attainment:
        return line[0].gpu_hours
    for less, more in pairwise(line):
        if attainment <= more.attainment:
            share = (attainment - less.attainment) / (more.attainment - less.attainment)
            return less.gpu_hours + share * (more.gpu_hours - less.gpu_hours)
    return None


def attained_for(line: Sequence[Point], gpu_hours: float) -> float | None:
    """Return what these GPU-hours or fewer attain, None where no run is as cheap."""
    if gpu_hours < line[0].gpu_hours:
        return None
    for less, more in pairwise(line):
        if gpu_hours <= more.gpu_hours:
            share = (gpu_hours - less.gpu_hours) / (more.gpu_hours - less.gpu_hours)
            return less.attainment + share * (more.attainment - less.attainment)
    return line[-1].attainment


def compare(line: Sequence[Point], other: Point) -> str:
    """Return how a policy with these runs compares with another's one run.

    "saves" and "serves" are what 3.7 (i) asks for; "ahead" is ahead by less than that.
    """
    hours = hours_for(line, other.attainment - EQUAL)
    attained = attained_for(line, other.gpu_hours)
    if hours is not None and hours <= SAVED_RATIO * other.gpu_hours:
        return "saves"
    if attained is not None and attained >= other.attainment + SERVED_MORE:
        return "serves"
    if hours is not None and hours <= other.gpu_hours:
        return "ahead"
    if attained is None and other.attainment < LOWEST_PROMISE:
        # Cheaper than our cheapest run, and worse than anybody can ask for.
        return "below the lowest promise"
    return "not ahead"
