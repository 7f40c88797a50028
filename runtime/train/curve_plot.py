"""Loss curves as a picture: a panel for each figure, the runs over each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from mizzen.picture import check_picture, new_figure, save
from mizzen.runtime.train.curve import StepRecord

_MOST_POINTS = 400  # of a line: more cannot be told apart, and make a large file
_COLORS = 10  # that follow each other in matplotlib's cycle, C0 to C9

Point = tuple[float, float]  # step, value


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """How one figure of one run went."""

    run: str
    figure: str
    points: Sequence[Point]
    is_holdout: bool = False


def lines_of(run: str, records: Sequence[StepRecord]) -> list[Line]:
    """Return the loss of a run's steps, what else they measured, and the same on the holdout."""
    steps = [{"loss": record.loss, **record.measured} for record in records]
    lines = []
    for is_holdout, rows in ((False, steps), (True, [record.holdout for record in records])):
        for figure in dict.fromkeys(name for row in rows for name in row):
            points = [
                (record.step, row[figure])
                for record, row in zip(records, rows, strict=True)
                if figure in row
            ]
            lines.append(Line(run=run, figure=figure, points=points, is_holdout=is_holdout))
    return lines


def thin(points: Sequence[Point], *, most: int = _MOST_POINTS) -> list[Point]:
    """Return at most so many points, each the mean of as many neighbours as that takes."""
    width = -(-len(points) // most)
    groups = (points[first : first + width] for first in range(0, len(points), width or 1))
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def plot_lines(lines: Iterable[Line], path: Path, *, title: str) -> None:
    """Write a picture of some runs to an .svg or .png file.

    Raises:
        PictureError: as `check_picture`.
    """
    check_picture(path)
    lines = list(lines)
    names = list(dict.fromkeys(line.figure for line in lines))
    colors = {run: f"C{number % _COLORS}" for number, run in enumerate(_runs(lines))}
    figure = new_figure(width=9, height=1 + 2.5 * len(names))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for name, panel in zip(names, panels, strict=True):
        for line in (line for line in lines if line.figure == name):
            steps, values = zip(*thin(line.points), strict=True)
            panel.plot(
                steps,
                values,
                "o--" if line.is_holdout else "-",
                color=colors[line.run],
                lw=1,
                ms=3,
                label=f"{line.run}, held out" if line.is_holdout else line.run,
            )
        panel.set(ylabel=name)
        panel.legend(fontsize="small", ncols=1 + len(colors) // 4)
    panels[0].set(title=title)
    panels[-1].set(xlabel="step")
    save(figure, path)


def _runs(lines: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(line.run for line in lines))
