"""Ranks that share a model and run out of memory begin again with fewer samples at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from hack.ports import free_port
from tests.fixtures.train_runs import (
    Job,
    assert_same_curve,
    exit_codes,
    read_curve,
    run,
    start,
    write_job,
    write_preferences,
    write_prompts,
)

# Without dropout, whose random numbers depend on how many samples run at once.
PLAIN = {"adaptation": {"type": "lora", "rank": 4, "alpha": 8.0}}
NO_GATE = {"evaluation": {"suites": []}}
SHORT = {**PLAIN, "hyperparameters": {"max_steps": 4}}


def two_ranks(root: Path, **overrides: Any) -> Job:
    return write_job(root, **{**SHORT, **overrides}, workers=2, parallelism={"tensor": 2})


def run_two(job: Job, *, room: tuple[int, int] | None, first_too: bool = False) -> list[int | None]:
    """Run a generation of which the second rank, or both, has so little memory."""
    job.root.joinpath("token").write_text("secret")
    port = free_port()
    leader = start(job, port=port, room=room if first_too else None)
    return exit_codes([leader, start(job, node_rank=1, port=port, room=room)])


def noted(job: Job) -> dict[str, Any]:
    (path,) = job.checkpoints.glob("at-once-*.json")
    return dict(json.loads(path.read_text()))


def test_one_rank_that_runs_out_has_all_go_on_with_half_from_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    alone = write_job(tmp_path / "alone", **SHORT, **NO_GATE)
    assert run(alone) == 0
    job = two_ranks(tmp_path / "job", **NO_GATE)
    # A step has two calls, and every second step is committed.
    assert run_two(job, room=(1, 6)) == [76, 75]
    assert noted(job) == {"ranks": 2, "micro_batch": 1, "drawn": 64}
    assert [path.name for path in job.checkpoints.glob("step-*")] == ["step-00000002"]
    assert run_two(job, room=(1, 0)) == [0, 0]
    assert_same_curve(read_curve(job), read_curve(alone))


def test_ranks_that_run_out_together_halve_until_one_sample_is_too_much(tmp_path: Path) -> None:
    job = two_ranks(tmp_path, hyperparameters={"max_steps": 2, "micro_batch": 4}, **NO_GATE)
    halved = []
    for _ in range(2):
        assert set(run_two(job, room=(0, 0), first_too=True)) <= {75, 76}
        notes = [json.loads(path.read_text()) for path in job.checkpoints.glob("at-once-*")]
        halved.append(min(note["micro_batch"] for note in notes))
    assert halved == [2, 1]
    codes = run_two(job, room=(0, 0), first_too=True)
    assert set(codes) <= {42, 76}
    assert job.word_of(codes.index(42))["reason"] == "MemoryTooSmall"


def test_a_rank_of_another_copy_has_all_begin_again(tmp_path: Path) -> None:
    job = write_job(tmp_path, **SHORT, **NO_GATE, workers=4, parallelism={"tensor": 2})
    job.root.joinpath("token").write_text("secret")
    for expected in ([76, 76, 76, 75], [0, 0, 0, 0]):
        port = free_port()
        well = [start(job, node_rank=rank, port=port) for rank in range(3)]
        assert exit_codes([*well, start(job, node_rank=3, port=port, room=(1, 0))]) == expected
    assert len(read_curve(job)) == 4


def test_a_frozen_model_is_asked_about_half_as_many_items(tmp_path: Path) -> None:
    data = write_preferences(tmp_path / "preferences.jsonl")
    job = two_ranks(
        tmp_path / "job",
        method="dpo",
        datasets=[{"name": "colours", "path": str(data)}],
        **NO_GATE,
    )
    # Each item is a pair.
    assert run_two(job, room=(2, 0)) == [76, 75]
    assert list(job.checkpoints.glob("notes/*")) == []
    assert run_two(job, room=(2, 0)) == [0, 0]


SUITES: dict[str, dict[str, Any]] = {
    "read": {"name": "holdout", "type": "perplexity", "max_regression_ratio": 1.0},
    "drawn": {"name": "said", "type": "exactMatch", "max_new_tokens": 2},
    "chosen": {"name": "chosen", "type": "classification"},
}


@pytest.mark.parametrize("kind", SUITES)
def test_the_gate_asks_half_as_many_questions(tmp_path: Path, kind: str) -> None:
    job = two_ranks(tmp_path, evaluation={"suites": [SUITES[kind]], "on_fail": "Warn"})
    assert run_two(job, room=(1, 0)) == [76, 75]
    expected = {"drawn": 1, "micro_batch": 2} if kind == "drawn" else {"micro_batch": 1}
    assert {**noted(job), **expected} == noted(job)
    codes = run_two(job, room=(1, 0))
    if kind == "drawn":  # what is learned from was not halved yet
        assert codes == [76, 75]
        codes = run_two(job, room=(1, 0))
    assert codes == [0, 0]
    assert job.last_word["evaluation"][0]["suite"] == SUITES[kind]["name"]


def test_a_policy_draws_half_as_many_answers(tmp_path: Path) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl")
    asked = {
        "method": "grpo",
        "datasets": [{"name": "p", "path": str(data)}],
        "rl": {
            "rewards": [{"type": "regex", "pattern": "[a-m]"}],
            "max_new_tokens": 4,
            "group_size": 2,
        },
        "hyperparameters": {"max_steps": 2, "batch_size": 2, "micro_batch": 2},
        **NO_GATE,
    }
    job = two_ranks(tmp_path / "job", **asked)
    assert run_two(job, room=(2, 0)) == [76, 75]
    assert noted(job) == {"ranks": 2, "micro_batch": 2, "drawn": 2}
    assert run_two(job, room=(2, 0)) == [0, 0]
    alone = write_job(tmp_path / "alone", **PLAIN, **asked)
    assert run(alone) == 0
    found, expected = read_curve(job), read_curve(alone)
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    assert [r.grad_norm for r in found] == pytest.approx([r.grad_norm for r in expected], rel=1e-3)
