"""Least squares with two inputs and no library: the control image has none for this alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fit:
    """z = base + per_x * x + per_y * y."""

    base: float
    per_x: float
    per_y: float

    def at(self, x: float, y: float) -> float:
        """Return the fitted value, never below a microsecond."""
        return max(1e-6, self.base + self.per_x * x + self.per_y * y)


def fit_plane(points: Collection[tuple[float, float, float]]) -> Fit:
    """Return the plane through (x, y, z) with the least squared error.

    An input that never varies, or that goes with the other, gets a slope of zero.
    """
    count = len(points)
    mean_x = sum(x for x, _, _ in points) / count
    mean_y = sum(y for _, y, _ in points) / count
    mean_z = sum(z for _, _, z in points) / count
    xx = sum((x - mean_x) ** 2 for x, _, _ in points)
    yy = sum((y - mean_y) ** 2 for _, y, _ in points)
    xy = sum((x - mean_x) * (y - mean_y) for x, y, _ in points)
    xz = sum((x - mean_x) * (z - mean_z) for x, _, z in points)
    yz = sum((y - mean_y) * (z - mean_z) for _, y, z in points)
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy > 0:
        per_x = (xz * yy - yz * xy) / determinant
        per_y = (yz * xx - xz * xy) / determinant
    else:
        per_x = xz / xx if xx > 0 else 0.0
        per_y = 0.0 if xx > 0 or yy <= 0 else yz / yy
    return Fit(mean_z - per_x * mean_x - per_y * mean_y, per_x, per_y)
