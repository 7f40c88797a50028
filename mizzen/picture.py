"""Pictures as files that say the same each time; needs matplotlib (extra `simulator`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")


class PictureError(Exception):
    """No picture can be drawn; the text says what to change."""


def check_picture(path: Path) -> None:
    """Say before a long run whether its picture could be drawn.

    Raises:
        PictureError: matplotlib or the file's folder is missing, or its name has another ending.
    """
    if path.suffix not in FORMATS:
        raise PictureError(f"{path.name} ends in neither {' nor '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise PictureError(f"There is no folder {path.parent} for {path.name}. Make it first.")
    if find_spec("matplotlib") is None:
        raise PictureError(
            "A plot needs matplotlib: pip install 'mizzen[simulator]', or leave --plot out."
        )


def new_figure(*, width: float, height: float) -> Figure:
    """Return an empty figure of that many inches; `check_picture` comes first."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra that few need

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write an .svg or .png file."""
    from matplotlib import rc_context  # noqa: PLC0415 - an extra that few need

    # The same picture gives the same file, and its words stay words.
    with rc_context({"svg.hashsalt": "mizzen", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
