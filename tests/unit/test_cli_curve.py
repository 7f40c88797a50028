"""`mizzen curve`: curves of jobs as a table and as a picture, and what is said of bad ones."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mizzen import picture
from mizzen.cli.commands import app
from mizzen.runtime.train.curve import StepRecord
from mizzen.runtime.train.curve_plot import lines_of, thin
from mizzen.runtime.train.history import LossHistory, note_holdout


def record(step: int, loss: float, **measured: float) -> StepRecord:
    return StepRecord(
        step=step, loss=loss, lr=0.1, grad_norm=1.0, tokens=7 * step, measured=measured
    )


def write_curve(folder: Path, *losses: float, **measured: float) -> Path:
    history = LossHistory(folder, resumed_step=0)
    for step, loss in enumerate(losses, 1):
        history.append(record(step, loss, **measured))
    return folder


def curve(*words: Path | str) -> Result:
    return CliRunner().invoke(app, ["curve", *map(str, words)])


def test_a_table_has_first_last_and_least_loss_of_each_run(tmp_path: Path) -> None:
    first = write_curve(tmp_path / "support", 3.0, 1.5, 2.0)
    note_holdout(first, 2, {"loss": 1.75})
    second = write_curve(tmp_path / "legal-terms", 2.5, 0.25) / "metrics.jsonl"
    done = curve(first, second)
    assert (done.exit_code, done.output.splitlines()) == (
        0,
        [
            "run          steps   first    last        least  least held out",
            "support          3  3.0000  2.0000  1.5000 at 2     1.7500 at 2",
            "legal-terms      2  2.5000  0.2500  0.2500 at 2               -",
        ],
    )


def test_runs_whose_folders_are_called_alike_keep_their_paths_and_copies_their_own_name(
    tmp_path: Path,
) -> None:
    folders = [write_curve(tmp_path / name / "checkpoints", 1.0) for name in ("a", "b")]
    copy = tmp_path / "copied.jsonl"
    copy.write_bytes((folders[0] / "metrics.jsonl").read_bytes())
    names = [row.split()[0] for row in curve(*folders, copy).output.splitlines()]
    assert names == ["run", *map(str, folders), "copied"]


def test_a_picture_has_a_panel_for_each_figure_and_a_name_for_each_run(tmp_path: Path) -> None:
    runs = [write_curve(tmp_path / "rl", 3.0, 2.0, reward=1.0, kl=0.5)]
    runs.append(write_curve(tmp_path / "sft", 2.0, 1.0))
    note_holdout(runs[1], 2, {"loss": 1.5})
    assert curve(*runs, "--plot", tmp_path / "loss.svg").exit_code == 0
    drawn = (tmp_path / "loss.svg").read_text()
    for word in ("loss", "reward", "kl", "rl", "sft", "sft, held out", "step"):
        assert f">{word}</text>" in drawn
    assert curve(*runs, "--plot", tmp_path / "again.svg").exit_code == 0
    assert (tmp_path / "again.svg").read_text() == drawn


def test_what_is_held_out_is_a_line_of_its_own() -> None:
    records = [record(1, 3.0, reward=0.5), record(2, 2.0, reward=1.0)]
    noted = StepRecord(step=3, loss=1.0, lr=0.1, grad_norm=1.0, tokens=21, holdout={"reward": 2.0})
    loss, reward, held_out = lines_of("a", [*records, noted])
    assert (loss.figure, loss.points) == ("loss", [(1, 3.0), (2, 2.0), (3, 1.0)])
    assert (reward.figure, reward.points) == ("reward", [(1, 0.5), (2, 1.0)])
    assert (held_out.figure, held_out.points, held_out.is_holdout) == ("reward", [(3, 2.0)], True)


def test_a_long_line_is_drawn_by_the_means_of_neighbours_and_a_short_one_as_it_is() -> None:
    points = [(float(step), float(step % 2)) for step in range(1, 8)]
    assert thin(points, most=7) == points
    assert thin(points, most=4) == [(1.5, 0.5), (3.5, 0.5), (5.5, 0.5), (7.0, 1.0)]
    assert len(thin([(float(step), 0.0) for step in range(99_999)])) <= 400


def bad_runs(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "empty.jsonl").touch()
    (folder / "other.jsonl").write_text('{"prompt": "no curve"}\n')
    (folder / "weights").write_bytes(b"\xff\xfe\x00")
    (folder / "merged").mkdir()
    return {
        "a folder without a curve": (folder / "merged", "merge, quantize and prune have none"),
        "a file that is not there": (folder / "none.jsonl", "none.jsonl. Name a job's published"),
        "a curve before its first step": (folder / "empty.jsonl", "holds no step"),
        "lines of something else": (folder / "other.jsonl", "metrics.jsonl of a job that has made"),
        "bytes that are no text": (folder / "weights", "cannot be read as text"),
    }


def test_a_run_without_a_curve_is_named_with_what_to_name_instead(tmp_path: Path) -> None:
    for what, (path, said) in bad_runs(tmp_path).items():
        done = curve(path)
        assert done.exit_code == 2, what
        assert str(path) in done.output, what
        assert said in done.output, what


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("loss.pdf", "loss.pdf ends in neither .svg nor .png"),
        ("nowhere/loss.svg", "There is no folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_curves_are_read(
    file: str, said: str, tmp_path: Path
) -> None:
    done = curve(tmp_path / "none", "--plot", tmp_path / file)
    assert done.exit_code == 2
    assert said in done.output
    assert "There is no file" not in done.output


def test_a_picture_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    done = curve(write_curve(tmp_path / "a", 1.0), "--plot", tmp_path / "loss.svg")
    assert done.exit_code == 2
    assert "pip install 'mizzen[simulator]'" in done.output
    assert curve(tmp_path / "a").exit_code == 0


def test_a_table_needs_none_of_the_runtimes_packages(tmp_path: Path) -> None:
    folder = write_curve(tmp_path / "a", 1.0)
    program = (
        "import sys\n"
        "for name in ('torch', 'safetensors', 'numpy', 'matplotlib'): sys.modules[name] = None\n"
        f"sys.argv = ['mizzen', 'curve', {str(folder)!r}]\n"
        "from mizzen.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1.0000" in done.stdout
