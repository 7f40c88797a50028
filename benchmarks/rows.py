"""How a benchmark prints: one JSON line per row as soon as it is known, a table at the end."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping

Row = Mapping[str, str | int | float | None]


class Rows:
    """The rows of one figure."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Print a row and keep it for the table."""
        self._rows.append(row)
        print(json.dumps(row), flush=True)

    def print_table(self) -> None:
        """Print every row again, in columns."""
        print(f"\n{self._title}\n{as_table(self._rows)}", flush=True)


def as_table(rows: Iterable[Row]) -> str:
    """Return rows in columns; a row without a column's value leaves it empty."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names] + [["" if row.get(n) is None else str(row[n]) for n in names] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def percentile(values: Iterable[float], rank: float) -> float:
    """Return the smallest value that at least `rank` percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(rank * len(ordered)) // 100) - 1)]


def median_ratio(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """Return the median over rounds of theirs/ours: each round's pair ran minutes apart at most."""
    return round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 2)
