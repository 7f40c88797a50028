"""Several workers learn as one: the same curve, one stop for all, and no worker left waiting."""

import json
import signal
from pathlib import Path

import pytest

from hack.ports import free_port
from hack.tiny_model import write_tiny_model
from tests.fixtures.train_runs import (
    assert_same_curve,
    exit_codes,
    read_curve,
    run,
    start,
    start_workers,
    wait_for_step,
    write_job,
    write_preferences,
)

WAIT_S = 400
LORA = {"adaptation": {"type": "lora", "rank": 4, "alpha": 8.0}}
FULL = {"adaptation": {"type": "full"}, "output": {"kind": "model"}}


EIGHT_BITS = {"adaptation": {**LORA["adaptation"], "type": "qlora", "quantization": "int8"}}
KINDS = {
    "lora": LORA,
    "full": FULL,
    "8 bits": EIGHT_BITS,
    "4 bits": {"adaptation": {**EIGHT_BITS["adaptation"], "quantization": "int4"}},
}


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_workers_together_learn_what_one_learns(tmp_path: Path, overrides: dict) -> None:
    alone = write_job(tmp_path / "alone", **overrides)
    assert run(alone) == 0
    shared = write_job(tmp_path / "shared", **overrides)
    assert exit_codes(start_workers(shared, 2)) == [0, 0]
    assert_same_curve(read_curve(shared), read_curve(alone))
    assert len(shared.artifacts) == 1


@pytest.mark.parametrize("kind", [LORA, FULL, EIGHT_BITS], ids=["lora", "full", "8 bits"])
@pytest.mark.parametrize("method", ["dpo", "reward", "distill"])
def test_workers_together_learn_by_other_methods_what_one_learns(
    tmp_path: Path, method: str, kind: dict
) -> None:
    asked = {**kind, "method": method}
    if method == "distill":
        teacher = write_tiny_model(tmp_path / "teacher", width=96, heads=6)
        asked |= {"distill": {"teacher": str(teacher)}}
    else:
        data = write_preferences(tmp_path / "votes.jsonl")
        asked |= {
            "datasets": [{"name": "votes", "path": str(data)}],
            "evaluation": {"suites": [{"name": "votes", "type": "preferenceLoss"}]},
        }
    alone = write_job(tmp_path / "alone", **asked)
    assert run(alone) == 0
    shared = write_job(tmp_path / "shared", **asked)
    assert exit_codes(start_workers(shared, 2)) == [0, 0]
    assert_same_curve(read_curve(shared), read_curve(alone))
    assert len(shared.artifacts) == 1


def test_more_workers_than_samples_in_a_step_still_learn_the_same(tmp_path: Path) -> None:
    short = {**LORA, "hyperparameters": {"batch_size": 2, "max_steps": 3}}
    alone = write_job(tmp_path / "alone", **short)
    assert run(alone) == 0
    shared = write_job(tmp_path / "shared", **short)
    assert exit_codes(start_workers(shared, 3)) == [0, 0, 0]
    assert_same_curve(read_curve(shared), read_curve(alone))


def test_the_same_workers_twice_give_the_same_bytes(tmp_path: Path) -> None:
    jobs = [write_job(tmp_path / name, **LORA) for name in ("one", "two")]
    for job in jobs:
        assert exit_codes(start_workers(job, 2)) == [0, 0]
    assert jobs[0].curve == jobs[1].curve
    assert jobs[0].weights_digest == jobs[1].weights_digest


@pytest.mark.parametrize("asked", [0, 1], ids=["the leader", "another worker"])
def test_all_stop_at_one_committed_step_when_one_is_asked_to(tmp_path: Path, asked: int) -> None:
    job = write_job(tmp_path, **LORA, hyperparameters={"max_steps": 100_000})
    workers = start_workers(job, 2)
    wait_for_step(job, 3)
    workers[asked].terminate()
    assert exit_codes(workers) == [75, 75]
    committed = sorted(job.checkpoints.glob("step-*"))[-1]
    assert int(committed.name.removeprefix("step-")) == read_curve(job)[-1].step


def test_a_job_goes_on_with_another_number_of_workers_as_if_nothing_had_changed(
    tmp_path: Path,
) -> None:
    calm = write_job(tmp_path / "calm", **LORA, hyperparameters={"max_steps": 12})
    assert run(calm) == 0
    job = write_job(tmp_path / "resized", **LORA, hyperparameters={"max_steps": 12})
    assert exit_codes(start_workers(job, 2, kill_at_sync=14)) == [-signal.SIGKILL, 76]
    assert len(read_curve(job)) < 12
    assert exit_codes(start_workers(job, 3)) == [0, 0, 0]
    assert_same_curve(read_curve(job), read_curve(calm))


def test_a_lost_worker_ends_the_generation_at_a_committed_step(tmp_path: Path) -> None:
    job = write_job(tmp_path, **LORA, hyperparameters={"max_steps": 100_000},
                    checkpoint={"every_steps": None, "every_seconds": None})  # fmt: skip
    workers = start_workers(job, 2)
    wait_for_step(job, 3)
    workers[1].kill()
    assert exit_codes(workers) == [76, -signal.SIGKILL]
    assert job.last_word["reason"] == "RankLost"
    committed = sorted(job.checkpoints.glob("step-*"))[-1]
    assert int(committed.name.removeprefix("step-")) == read_curve(job)[-1].step


def test_a_worker_that_was_told_something_else_is_turned_away(tmp_path: Path) -> None:
    job = write_job(tmp_path / "ours", **LORA)
    other = write_job(tmp_path / "other", **LORA, workers=2)
    other.root.joinpath("token").write_text("secret")
    port = free_port()
    write_job(tmp_path / "ours", **LORA, workers=2).root.joinpath("token").write_text("secret")
    workers = [start(job, port=port), start(other, node_rank=1, port=port)]
    workers[1].join(WAIT_S)
    workers[0].kill()
    assert exit_codes(workers) == [-signal.SIGKILL, 1]
    word = json.loads((other.root / "termination-log1").read_text())
    assert word["reason"] == "NodesDisagree"
