"""`mizzen curve`: how the loss of fine-tune jobs went, as a table and as a picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mizzen.runtime.train.curve import StepRecord


class CurveFileError(ValueError):
    """What was named holds no curve; the text says what is expected."""


def curve(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Published results or folders of jobs' checkpoints, or their curves."),
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture of all of them: .svg or .png.")
    ] = None,
) -> None:
    """Print how the loss of fine-tune jobs went, and draw it with whatever else they measured."""
    from mizzen.picture import PictureError, check_picture
    from mizzen.runtime.train.curve_plot import lines_of, plot_lines

    try:
        if plot is not None:
            check_picture(plot)
        curves = {name: _read(path) for name, path in _named(runs).items()}
        if plot is not None:
            lines = [line for name, records in curves.items() for line in lines_of(name, records)]
            plot_lines(lines, plot, title="Loss" if len(curves) > 1 else next(iter(curves)))
    except (CurveFileError, PictureError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(_as_table(curves))


def _named(paths: Sequence[Path]) -> Mapping[str, Path]:
    """Return the runs by the names of their folders; as they were given where those are alike."""
    files = list(dict.fromkeys(paths))
    short = [_short_name(path) for path in files]
    counts = Counter(short)
    return {
        name if counts[name] == 1 else str(path): path
        for name, path in zip(short, files, strict=True)
    }


def _short_name(path: Path) -> str:
    from mizzen.runtime.train.curve import CURVE_FILE

    whole = path.resolve()
    if whole.is_dir():
        return whole.name
    return whole.parent.name if whole.name == CURVE_FILE else whole.stem


def _read(path: Path) -> list[StepRecord]:
    """Return the steps of a curve, at least one.

    Raises:
        CurveFileError: there is none.
    """
    from mizzen.runtime.train.curve import CURVE_FILE, read_history

    file = path / CURVE_FILE if path.is_dir() else path
    if not file.is_file():
        raise CurveFileError(
            f"There is no file {file}. Name a job's published result, the folder of its "
            "checkpoints or the curve itself; merge, quantize and prune have none."
        )
    try:
        records = read_history(file)
    except (OSError, UnicodeDecodeError) as error:
        raise CurveFileError(f"{file} cannot be read as text: {error}.") from error
    if not records:
        raise CurveFileError(
            f"{file} holds no step. Name a {CURVE_FILE} of a job that has made one."
        )
    return records


def _as_table(curves: Mapping[str, Sequence[StepRecord]]) -> str:
    rows: list[tuple[str, ...]] = [("run", "steps", "first", "last", "least", "least held out")]
    rows += [(name, *_row(records)) for name, records in curves.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _row(records: Sequence[StepRecord]) -> tuple[str, ...]:
    losses = [(record.loss, record.step) for record in records]
    held_out = [(r.holdout["loss"], r.step) for r in records if "loss" in r.holdout]
    return (
        str(records[-1].step),
        f"{losses[0][0]:.4f}",
        f"{losses[-1][0]:.4f}",
        _least(losses),
        _least(held_out) if held_out else "-",
    )


def _least(losses: Sequence[tuple[float, int]]) -> str:
    loss, step = min(losses)
    return f"{loss:.4f} at {step}"
