"""The checkpoints that are best on the holdout are kept, and the best of them is the result."""

import json
import math
import signal
import time
from itertools import count, takewhile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mizzen.runtime.train.checkpoint import CheckpointStore, Counters, TrainState
from mizzen.runtime.train.trainable import WEIGHTS
from tests.fixtures.train_runs import (
    Job,
    exit_codes,
    read_curve,
    run,
    start_workers,
    write_job,
    write_prompts,
    write_samples,
)

KEEP = {"keep_best": 1, "keep_last": 1}


def kept(job: Job) -> list[str]:
    return sorted(path.name for path in job.checkpoints.glob("step-*"))


def losses(job: Job) -> dict[int, float]:
    """Mean losses on the holdout by step, those that were counted to their end."""
    tallies = json.loads((job.checkpoints / "evaluation.json").read_text())["tallies"]
    samples = tallies["base/holdout"]["samples"]
    return {
        int(name.split("/")[0].removeprefix("step-")): tally["total"] / tally["weight"]
        for name, tally in tallies.items()
        if name.endswith("/validation") and tally["samples"] == samples
    }


def held_out(job: Job) -> dict[int, dict[str, float]]:
    """What the curve says of the holdout, by step."""
    return {record.step: record.holdout for record in read_curve(job) if record.holdout}


def make_best(job: Job, *steps: int) -> None:
    """Let these steps have measured best, the first one before all."""
    file = job.checkpoints / "evaluation.json"
    document = json.loads(file.read_text())
    for place, step in enumerate(steps):
        document["tallies"][f"step-{step:08d}/validation"]["total"] = float(place)
    file.write_text(json.dumps(document))


def published_step(job: Job) -> int:
    path = Path(job.last_word["artifact"]["path"])
    return int(json.loads((path / "artifact.json").read_text())["step"])


def published_weights(job: Job) -> dict[str, torch.Tensor]:
    path = Path(job.last_word["artifact"]["path"]) / "adapter_model.safetensors"
    return {name.removeprefix("base_model.model."): t for name, t in load_file(path).items()}


def test_the_best_are_kept_beside_the_last_and_the_best_is_published(tmp_path: Path) -> None:
    job = write_job(tmp_path, checkpoint={**KEEP, "keep_best": 2})
    assert run(job) == 0
    measured = losses(job)
    assert list(measured) == [2, 4, 6, 8]
    best = sorted(measured, key=lambda step: measured[step])
    assert held_out(job) == {step: {"loss": loss} for step, loss in measured.items()}
    assert kept(job) == sorted(f"step-{step:08d}" for step in {*best[:2], 8})
    assert published_step(job) == best[0]


def test_where_more_is_better_the_curve_has_the_holdouts_reward(tmp_path: Path) -> None:
    job = write_job(
        tmp_path,
        method="grpo",
        datasets=[{"name": "p", "path": str(write_prompts(tmp_path / "prompts.jsonl"))}],
        rl={"rewards": [{"type": "regex", "pattern": "[a-m]"}], "max_new_tokens": 4},
        hyperparameters={"max_steps": 2},
        checkpoint=KEEP,
        evaluation={"suites": []},
    )
    assert run(job) == 0
    ((step, figures),) = held_out(job).items()
    assert (step, list(figures)) == (2, ["reward"])
    assert 0 <= figures["reward"] <= 1


def test_a_better_earlier_step_is_the_result_though_training_went_on(tmp_path: Path) -> None:
    job = write_job(tmp_path, checkpoint={**KEEP, "keep_best": 4})
    assert run(job) == 0
    make_best(job, 4)
    assert run(job) == 0
    assert published_step(job) == 4
    assert job.last_word["step"] == 8
    expected = load_file(job.checkpoints / "step-00000004" / f"{WEIGHTS}.safetensors")
    last = load_file(job.checkpoints / "step-00000008" / f"{WEIGHTS}.safetensors")
    total = sum(t.double().abs().sum() for t in published_weights(job).values())
    assert torch.allclose(total, sum(t.double().abs().sum() for t in expected.values()))
    assert not torch.allclose(total, sum(t.double().abs().sum() for t in last.values()))


def test_a_damaged_best_gives_way_to_the_second_best(tmp_path: Path) -> None:
    job = write_job(tmp_path, checkpoint={**KEEP, "keep_best": 4})
    assert run(job) == 0
    measured = losses(job)
    # Not the last step, which would be made again, nor the one the gate has already measured.
    best, second = [step for step in (2, 4, 6) if step != published_step(job)][:2]
    make_best(job, best, second)
    (job.checkpoints / f"step-{best:08d}" / f"{WEIGHTS}.safetensors").write_bytes(b"")
    assert run(job) == 0
    assert published_step(job) == second
    (suite,) = job.last_word["evaluation"]
    assert suite["candidate"] == pytest.approx(math.exp(measured[second]), rel=1e-5)
    assert job.last_word["evalLoss"] == pytest.approx(measured[second], rel=1e-5)


def test_a_run_killed_over_and_over_keeps_and_publishes_what_the_undisturbed_one_does(
    tmp_path: Path,
) -> None:
    short = {"checkpoint": KEEP, "hyperparameters": {"max_steps": 4}}
    reference = write_job(tmp_path / "reference", **short)
    assert run(reference) == 0
    job = write_job(tmp_path / "killed", **short)
    codes = list(
        takewhile(lambda code: code != 0, (run(job, kill_at_sync=n) for n in count(10, 4)))
    )
    assert set(codes) == {-signal.SIGKILL}
    assert losses(job) == losses(reference)
    assert kept(job) == kept(reference)
    assert job.curve == reference.curve
    assert job.weights_digest == reference.weights_digest


@pytest.mark.parametrize(("protected", "left"), [((), [3, 4]), ((1,), [1, 3, 4])])
def test_a_protected_step_outlives_the_last_ones(
    tmp_path: Path, protected: tuple[int, ...], left: list[int]
) -> None:
    store = CheckpointStore(tmp_path, fingerprint="f", base="b", generation=1, keep=2)
    store.protect(protected)
    for step in (1, 2, 3, 4):
        tensors = {WEIGHTS: {"a": torch.full((2,), float(step))}}
        store.commit(TrainState(counters=Counters(step=step), tensors=tensors))
    assert store.steps() == left
    newest = store.load(4)
    assert newest is not None
    assert newest.tensors[WEIGHTS]["a"].tolist() == [4.0, 4.0]


GROUPS = {"two copies": (2, 1), "two ranks": (2, 2), "two copies of two ranks": (4, 2)}


@pytest.mark.parametrize(("workers", "tensor"), GROUPS.values(), ids=GROUPS)
def test_several_workers_keep_and_publish_the_steps_that_one_does(
    tmp_path: Path, workers: int, tensor: int
) -> None:
    best = {"checkpoint": {**KEEP, "keep_best": 2}, "hyperparameters": {"max_steps": 6}}
    alone = write_job(tmp_path / "alone", **best)
    assert run(alone) == 0
    job = write_job(tmp_path / "job", **best, parallelism={"tensor": tensor})
    assert exit_codes(start_workers(job, workers)) == [0] * workers
    assert losses(job) == pytest.approx(losses(alone), rel=1e-4)
    assert [list(figures) for figures in held_out(job).values()] == [["loss"]] * 3
    assert kept(job) == kept(alone)
    assert published_step(job) == published_step(alone)


def test_ranks_take_the_second_best_where_a_part_of_the_best_is_damaged(tmp_path: Path) -> None:
    job = write_job(tmp_path, checkpoint={**KEEP, "keep_best": 4}, parallelism={"tensor": 2})
    assert exit_codes(start_workers(job, 2)) == [0, 0]
    best, second = [step for step in (2, 4, 6) if step != published_step(job)][:2]
    make_best(job, best, second)
    damaged = job.checkpoints / f"step-{best:08d}" / f"{WEIGHTS}-00002-of-00002.safetensors"
    damaged.write_bytes(b"")
    assert exit_codes(start_workers(job, 2)) == [0, 0]
    assert published_step(job) == second
    total = sum(
        tensor.double().abs().sum()
        for part in (job.checkpoints / f"step-{second:08d}").glob(f"{WEIGHTS}-*")
        for name, tensor in load_file(part).items()
    )
    published = sum(t.double().abs().sum() for t in published_weights(job).values())
    assert torch.allclose(published, total)


@pytest.mark.parametrize(("workers", "tensor"), GROUPS.values(), ids=GROUPS)
def test_all_workers_yield_while_the_holdout_is_asked(
    tmp_path: Path, workers: int, tensor: int
) -> None:
    data = write_samples(tmp_path / "many.jsonl", 1200)
    job = write_job(
        tmp_path / "job",
        checkpoint=KEEP,
        processing={"holdout_ratio": 0.9},
        hyperparameters={"micro_batch": 1},
        datasets=[{"name": "colours", "path": str(data)}],
        evaluation={"suites": []},
        parallelism={"tensor": tensor},
    )
    running = start_workers(job, workers)
    ends_at = time.monotonic() + 400
    while not (job.checkpoints / "step-00000002").exists():
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    time.sleep(0.2)
    running[-1].terminate()
    assert exit_codes(running) == [75] * workers
    tallies = json.loads((job.checkpoints / "evaluation.json").read_text())["tallies"]
    assert 0 < tallies["step-00000002/validation"]["samples"] < 1000
    assert kept(job) == ["step-00000002"]
