"""A job that has used its budget ends well: what it learned by then is measured and published."""

import signal
from pathlib import Path

import pytest

from mizzen.runtime.train.budget import Spent, find_spent
from mizzen.runtime.train.checkpoint import Counters
from mizzen.runtime.train.config import Budget
from mizzen.runtime.train.curve import read_history
from tests.fixtures.train_runs import Job, exit_codes, run, start_workers, write_job

HOUR_MS = 3_600_000
A_MOMENT = {"max_hours": 1e-9}

CASES: dict[str, tuple[Budget, Counters, Spent | None]] = {
    "no budget is never spent": (Budget(), Counters(tokens=10**12, trained_ms=10**12), None),
    "fewer tokens may go on": (Budget(max_tokens=100), Counters(tokens=99), None),
    "as many tokens may not": (Budget(max_tokens=100), Counters(tokens=100), "maxTokens"),
    "less time may go on": (Budget(max_hours=0.5), Counters(trained_ms=HOUR_MS // 2 - 1), None),
    "as much time may not": (
        Budget(max_hours=0.5), Counters(trained_ms=HOUR_MS // 2), "maxHours",
    ),
    "tokens are named first": (
        Budget(max_hours=1, max_tokens=1), Counters(tokens=1, trained_ms=HOUR_MS), "maxTokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("budget", "counters", "spent"), CASES.values(), ids=CASES)
def test_find_spent(budget: Budget, counters: Counters, spent: Spent | None) -> None:
    assert find_spent(budget, counters) == spent


def steps(job: Job) -> int:
    return len(read_history(job.checkpoints / "metrics.jsonl"))


def assert_ended_well(job: Job, spent: Spent) -> None:
    word = job.last_word
    assert (word["phase"], word["budgetSpent"]) == ("Succeeded", spent)
    assert word["step"] == word["checkpoint"]["step"] == steps(job)
    assert [suite["suite"] for suite in word["evaluation"]] == ["holdout"]
    assert [Path(word["artifact"]["path"])] == job.artifacts


def test_a_job_ends_with_the_step_in_which_its_tokens_are_used_up(tmp_path: Path) -> None:
    whole = write_job(tmp_path / "whole")
    assert run(whole) == 0
    assert whole.last_word["budgetSpent"] is None
    tokens = [record.tokens for record in read_history(whole.checkpoints / "metrics.jsonl")]
    job = write_job(tmp_path / "budget", budget={"max_tokens": tokens[2] - 1})
    assert run(job) == 0
    assert_ended_well(job, "maxTokens")
    assert job.curve.splitlines() == whole.curve.splitlines()[:3]


def test_a_job_ends_with_the_step_in_which_its_time_is_used_up(tmp_path: Path) -> None:
    job = write_job(tmp_path, budget=A_MOMENT)
    assert run(job) == 0
    assert_ended_well(job, "maxHours")
    assert steps(job) == 1


def test_the_time_of_earlier_runs_counts(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    assert run(job, kill_at_sync=20) == -signal.SIGKILL
    committed = sorted(job.checkpoints.glob("step-*"))[-1]
    write_job(tmp_path, budget=A_MOMENT)
    assert run(job) == 0
    assert_ended_well(job, "maxHours")
    assert committed.name == f"step-{steps(job):08d}"


def test_workers_end_at_the_same_step_by_the_leaders_clock(tmp_path: Path) -> None:
    job = write_job(tmp_path, budget=A_MOMENT)
    assert exit_codes(start_workers(job, 2)) == [0, 0]
    assert_ended_well(job, "maxHours")
    assert steps(job) == 1
