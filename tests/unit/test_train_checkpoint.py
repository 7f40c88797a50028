"""A checkpoint is whole or is not there, and a full disk takes none of the earlier ones."""

import json
import multiprocessing
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hack.tiny_model import write_tiny_model
from mizzen.runtime.train import checkpoint
from mizzen.runtime.train.checkpoint import CheckpointStore, Counters, TrainState
from mizzen.runtime.train.config import Checkpointing
from mizzen.runtime.train.curve import StepRecord, read_history
from mizzen.runtime.train.digest import mark_model, mark_weights
from mizzen.runtime.train.errors import (
    BaseModelChangedError,
    CheckpointDamagedError,
    CheckpointMismatchError,
    StorageFullError,
    StorageNotWritableError,
)
from mizzen.runtime.train.history import LossHistory, note_holdout


def store_in(
    directory: Path, *, fingerprint: str = "same", base: str = "model", keep: int = 2
) -> CheckpointStore:
    return CheckpointStore(directory, fingerprint=fingerprint, base=base, generation=1, keep=keep)


def state_at(step: int, *, size: int = 8) -> TrainState:
    tensors = {"weights": {"w": torch.full((size,), float(step))}}
    return TrainState(counters=Counters(step=step, samples=4 * step, tokens=9), tensors=tensors)


def restored_step(store: CheckpointStore) -> int | None:
    found = store.restore()
    return found[0].step if found else None


def test_what_was_committed_is_restored(tmp_path: Path) -> None:
    committed = store_in(tmp_path).commit(state_at(3))
    found, state = store_in(tmp_path).restore() or pytest.fail("nothing restored")
    assert found == committed
    assert state.counters == Counters(step=3, samples=12, tokens=9)
    assert state.tensors["weights"]["w"].tolist() == [3.0] * 8


def test_nothing_is_restored_before_the_first_commit(tmp_path: Path) -> None:
    assert store_in(tmp_path / "not there yet").restore() is None


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        store.commit(state_at(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_committing_the_same_step_again_changes_nothing(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    first = store.commit(state_at(1))
    assert store.commit(state_at(1)) == first


def flip_a_bit(folder: Path) -> None:
    file = folder / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def shorten(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"counters":')


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "a shortened file": shorten,
    "a missing file": lambda folder: (folder / "weights.safetensors").unlink(),
    "a missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a broken manifest": break_manifest,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_its_step_committed_again(
    tmp_path: Path, damage
) -> None:
    store = store_in(tmp_path)
    store.commit(state_at(1))
    damage(store.commit(state_at(2)).path)
    assert restored_step(store_in(tmp_path)) == 1
    store.commit(state_at(2))
    assert restored_step(store_in(tmp_path)) == 2


def test_a_half_written_checkpoint_is_never_chosen_and_is_removed(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    committed = store.commit(state_at(1)).path
    # Complete in every byte, but not renamed: the process died just before.
    (tmp_path / "step-00000001").rename(tmp_path / ".partial-step-00000002")
    assert restored_step(store_in(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []
    assert not committed.exists()


def test_a_result_is_not_read_from_damaged_files(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    path = store.commit(state_at(1)).path
    expected = state_at(1).tensors["weights"]
    assert dict(store.tensors(1, "weights")).keys() == expected.keys()
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointDamagedError, match="goes on from the checkpoint before it"):
        store.tensors(1, "weights")


def test_a_checkpoint_of_another_job_is_an_error_and_stays(tmp_path: Path) -> None:
    path = store_in(tmp_path).commit(state_at(1)).path
    with pytest.raises(CheckpointMismatchError, match="give the job a new name to start afresh"):
        store_in(tmp_path, fingerprint="another").restore()
    assert path.exists()


def test_a_volume_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path)
    store.commit(state_at(1))
    usage = checkpoint.shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageFullError, match=r"the volume is full. It needs 2 MiB. Enlarge the"):
        store.commit(state_at(2, size=2**19))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def commit_under_a_limit(directory: Path, limit_bytes: int) -> None:
    """Exit with 0 if a commit that outgrows the limit fails with the right error."""
    store = store_in(directory)
    store.commit(state_at(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    with pytest.raises(StorageFullError, match="cannot be written to"):
        store.commit(state_at(2, size=limit_bytes))


def test_a_wall_met_while_writing_leaves_the_earlier_checkpoint_alone(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(
        target=commit_under_a_limit, args=(tmp_path, 64 * 1024)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert restored_step(store_in(tmp_path)) == 1


def test_a_folder_that_cannot_be_made_says_who_needs_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageNotWritableError, match="Give uid 65532 write access"):
        store_in(tmp_path / "x").commit(state_at(1))


def record(step: int) -> StepRecord:
    return StepRecord(step=step, loss=1 / 3 / step, lr=0.1, grad_norm=1.0, tokens=7 * step)


def test_the_curve_is_cut_where_a_resumed_job_goes_on(tmp_path: Path) -> None:
    history = LossHistory(tmp_path, resumed_step=0)
    for step in (1, 2, 3):
        history.append(record(step))
    whole = history.path.read_text()
    resumed = LossHistory(tmp_path, resumed_step=2)
    assert resumed.last == record(2)
    resumed.append(record(3))
    assert resumed.path.read_text() == whole


def test_what_is_noted_of_the_holdout_stays_and_noting_it_again_changes_nothing(
    tmp_path: Path,
) -> None:
    note_holdout(tmp_path, 1, {"loss": 0.5})  # of a curve that somebody has removed
    history = LossHistory(tmp_path, resumed_step=0)
    assert not history.path.exists()
    for step in (1, 2):
        history.append(record(step))
    note_holdout(tmp_path, 1, {"loss": 0.5})
    history.append(record(3))
    whole = history.path.read_text()
    note_holdout(tmp_path, 1, {"loss": 0.5})
    assert history.path.read_text() == whole
    noted = replace(record(1), holdout={"loss": 0.5})
    assert read_history(history.path) == [noted, record(2), record(3)]
    assert LossHistory(tmp_path, resumed_step=1).last == noted


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    history = LossHistory(tmp_path, resumed_step=0)
    history.append(record(1))
    with history.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_history(history.path) == [record(1)]
    assert LossHistory(tmp_path, resumed_step=5).path.read_text().count("\n") == 1


def test_a_checkpoint_beside_another_base_model_is_an_error_unless_it_does_not_say(
    tmp_path: Path,
) -> None:
    committed = store_in(tmp_path).commit(state_at(3))
    with pytest.raises(BaseModelChangedError, match=r"have changed since step-00000003"):
        store_in(tmp_path, base="another").restore()
    manifest = committed.path / "manifest.json"
    document = json.loads(manifest.read_text())
    del document["base"]
    manifest.write_text(json.dumps(document))
    assert restored_step(store_in(tmp_path, base="another")) == 3


def test_models_are_told_apart_by_name_size_and_content(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    marks = []
    for content in (b"a" * 200_000, b"a" * 200_001, b"a" * 199_999 + b"b"):
        file.write_bytes(content)
        marks += [mark_model(tmp_path), mark_model(file)]
    file.rename(tmp_path / "v.safetensors")
    marks.append(mark_model(tmp_path))
    assert len(set(marks)) == len(marks)


@pytest.mark.parametrize(
    ("every_steps", "every_seconds", "due_steps", "is_late"),
    [
        (2, None, [2, 4], False),
        (None, 10.0, [], True),
        (3, 60.0, [3], False),
        (None, None, [], False),
    ],
)
def test_a_commit_is_due_by_the_number_of_steps_or_by_the_time_since_the_last(
    every_steps: int | None, every_seconds: float | None, due_steps: list[int], is_late: bool
) -> None:
    rules = Checkpointing(
        directory=Path("unused"), every_steps=every_steps, every_seconds=every_seconds
    )
    assert [step for step in range(5) if rules.is_step_due(step)] == due_steps
    assert rules.is_time_up(10.0) is is_late


def test_weights_are_told_apart_whatever_lies_beside_them(tmp_path: Path) -> None:
    one, other = write_tiny_model(tmp_path / "a"), write_tiny_model(tmp_path / "b", layers=3)
    mark = mark_weights(one)
    for beside in ("README.md", "training_args.bin"):
        (one / beside).write_text("notes")
    assert mark_weights(one) == mark != mark_weights(other)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"weights")
    assert mark_weights(tmp_path / "pickled") != mark
    for nothing in (tmp_path / "gone", tmp_path):
        with pytest.raises(FileNotFoundError, match="There are no weights in"):
            mark_weights(nothing)
