"""A job that is killed or asked to yield, anywhere, ends as if nothing had happened."""

import random
import signal
import time
from itertools import count, takewhile
from pathlib import Path

import pytest

from tests.fixtures.train_runs import Job, run, start, write_job, write_samples

LORA = {"adaptation": {"type": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1}}
FULL = {"adaptation": {"type": "full"}, "output": {"kind": "model"}}
WRITES_AT_LEAST = 12  # a commit, two evaluations and a publication


def undisturbed(root: Path, overrides: dict) -> Job:
    job = write_job(root, **overrides)
    assert run(job) == 0
    return job


def assert_same_outcome(job: Job, reference: Job) -> None:
    assert job.curve == reference.curve
    assert job.weights_digest == reference.weights_digest
    assert job.last_word["evaluation"] == reference.last_word["evaluation"]


@pytest.mark.parametrize("overrides", [LORA, FULL], ids=["lora with dropout", "full"])
def test_a_run_killed_over_and_over_repeats_the_undisturbed_one(
    tmp_path: Path, overrides: dict
) -> None:
    reference = undisturbed(tmp_path / "reference", overrides)
    job = write_job(tmp_path / "killed", **overrides)
    # Each generation dies one write later than the last one did.
    codes = list(takewhile(lambda code: code != 0, (run(job, kill_at_sync=n) for n in count(1))))
    assert set(codes) == {-signal.SIGKILL}
    assert_same_outcome(job, reference)


def test_a_run_killed_before_any_write_to_disk_repeats_the_undisturbed_one(tmp_path: Path) -> None:
    short = {**LORA, "hyperparameters": {"max_steps": 2}}
    reference = undisturbed(tmp_path / "reference", short)
    # From the first write of the base's evaluation to the last one of the publication.
    for number in count(1):
        job = write_job(tmp_path / f"killed-{number}", **short)
        if run(job, kill_at_sync=number) == 0:
            break
        assert run(job) == 0
        assert_same_outcome(job, reference)
    assert number > WRITES_AT_LEAST


def test_a_run_killed_at_random_moments_repeats_the_undisturbed_one(tmp_path: Path) -> None:
    reference = undisturbed(tmp_path / "reference", LORA)
    moments = random.Random(3)
    job = write_job(tmp_path / "killed", **LORA)
    for _ in range(6):
        process = start(job)
        time.sleep(moments.uniform(0.05, 0.8))
        process.kill()
        process.join()
    assert run(job) == 0
    assert_same_outcome(job, reference)


def test_a_run_that_yields_again_and_again_repeats_the_undisturbed_one(tmp_path: Path) -> None:
    reference = undisturbed(tmp_path / "reference", LORA)
    job = write_job(tmp_path / "yielding", **LORA, checkpoint={"every_steps": None})
    moments = random.Random(5)
    codes = []
    for _ in range(6):
        process = start(job)
        time.sleep(moments.uniform(0.2, 0.8))
        process.terminate()
        process.join()
        codes.append(process.exitcode)
        if process.exitcode == 0:
            break
    # A SIGTERM before our handler stands ends a process as it ends any other.
    assert set(codes) <= {75, 0, -signal.SIGTERM}
    assert codes[-1] == 0 or run(job) == 0
    assert_same_outcome(job, reference)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path: Path) -> None:
    reference = undisturbed(tmp_path / "reference", LORA)
    job = undisturbed(tmp_path / "damaged", LORA)
    newest = sorted(job.checkpoints.glob("step-*"))[-1]
    weights = newest / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert run(job) == 0
    assert_same_outcome(job, reference)


def test_more_samples_at_once_may_be_changed_between_generations(tmp_path: Path) -> None:
    job = write_job(tmp_path, **LORA)
    assert run(job, kill_at_sync=14) == -signal.SIGKILL
    write_job(tmp_path, **LORA, hyperparameters={"micro_batch": 4})
    assert run(job) == 0
    assert job.last_word["step"] == 8


def test_other_settings_do_not_continue_a_checkpoint(tmp_path: Path) -> None:
    job = write_job(tmp_path, **LORA)
    assert run(job, kill_at_sync=14) == -signal.SIGKILL
    write_job(tmp_path, **LORA, hyperparameters={"learning_rate": 0.02})
    assert run(job) == 42
    assert job.last_word["reason"] == "CheckpointMismatch"
    assert "Restore them, or give the job a new name" in job.last_word["message"]


def test_a_dataset_that_shrank_does_not_continue_a_checkpoint(tmp_path: Path) -> None:
    job = write_job(tmp_path, **LORA)
    assert run(job, kill_at_sync=14) == -signal.SIGKILL
    write_samples(tmp_path / "data.jsonl", count=20)
    assert run(job) == 42
    assert job.last_word["reason"] == "CheckpointMismatch"
    assert "other settings or data" in job.last_word["message"]


def test_another_base_model_at_the_same_place_does_not_continue_a_checkpoint(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, **LORA)
    assert run(job, kill_at_sync=14) == -signal.SIGKILL
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = bytes(4)
    weights.write_bytes(bytes(content))
    assert run(job) == 42
    assert job.last_word["reason"] == "BaseModelChanged"
    assert "Put the former ones back" in job.last_word["message"]
