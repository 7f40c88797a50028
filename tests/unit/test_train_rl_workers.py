"""Workers draw, judge and learn from rewards together as one does, on one copy or on several."""

from pathlib import Path

import pytest

from hack.tiny_model import write_tiny_model
from tests.fixtures.train_runs import (
    Job,
    exit_codes,
    read_curve,
    run,
    start_workers,
    wait_for_step,
    write_job,
    write_preferences,
    write_prompts,
)

LORA = {"adaptation": {"type": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1}}
EIGHT_BITS = {"adaptation": {**LORA["adaptation"], "type": "qlora", "quantization": "int8"}}
FULL = {"adaptation": {"type": "full"}, "output": {"kind": "model"}}
RARELY = {"checkpoint": {"every_steps": None, "every_seconds": None}}
# A random model says each of them in about a third of its answers of eight letters.
LETTERS = [{"type": "regex", "pattern": f"[{span}]"} for span in ("a-m", "n-z", "A-M")]
# Few steps: what is rounded otherwise at each must not grow until another token is drawn.
REWARDED = {
    **RARELY,
    "rl": {"rewards": LETTERS, "max_new_tokens": 8, "group_size": 4, "epochs": 2},
    "hyperparameters": {"max_steps": 3, "batch_size": 8, "micro_batch": 32},
    "evaluation": {"suites": [{"name": "worth", "type": "reward"}], "on_fail": "Warn"},
}

# At ten times this rate two steps take all weights so far that on one rank, too, the roundings of
# another attention move the drift by 2e-5.
SLOWLY = {"hyperparameters": {**REWARDED["hyperparameters"], "learning_rate": 1e-3}}


def rewarded(root: Path, workers: int, *, tensor: int, **overrides: dict) -> Job:
    """Write a job that learns from rewards, for so many workers."""
    data = write_prompts(root.parent / "prompts.jsonl")
    asked = {**REWARDED, "datasets": [{"name": "questions", "path": str(data)}], **overrides}
    return write_job(root, workers=workers, parallelism={"tensor": tensor}, **asked)


def assert_same_answers(found: Job, expected: Job) -> None:
    curves = [read_curve(job) for job in (found, expected)]
    assert [len(curve) for curve in curves] == [3, 3]
    for ours, theirs in zip(*curves, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.measured == pytest.approx(theirs.measured, abs=1e-5)
        # Advantages add up to nothing, so what is left of the loss is small.
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-2)
    assert found.last_word["reward"] == pytest.approx(expected.last_word["reward"])
    (ours,), (theirs,) = (job.last_word["evaluation"] for job in (found, expected))
    assert ours["base"] == pytest.approx(theirs["base"])
    assert ours["candidate"] == pytest.approx(theirs["candidate"])


POLICIES = {
    "two ranks, grpo beside 8 bits": (2, 2, {"method": "grpo", **EIGHT_BITS}),
    "two ranks, ppo full": (2, 2, {"method": "ppo", **FULL, **SLOWLY}),
    # Without dropout: what is dropped follows from which answers run at once.
    "two copies, ppo lora": (2, 1, {"method": "ppo"}),
    "two copies of two ranks, grpo lora": (4, 2, {"method": "grpo"}),
}


@pytest.mark.parametrize(("workers", "tensor", "policy"), POLICIES.values(), ids=POLICIES)
def test_workers_draw_and_learn_from_rewards_as_one_does(
    tmp_path: Path, workers: int, tensor: int, policy: dict
) -> None:
    alone = rewarded(tmp_path / "alone", 1, tensor=1, **policy)
    assert run(alone) == 0
    spread = rewarded(tmp_path / "spread", workers, tensor=tensor, **policy)
    assert set(exit_codes(start_workers(spread, workers))) == {0}
    assert_same_answers(spread, alone)


def test_a_reward_model_is_spread_like_the_policy_it_judges(tmp_path: Path) -> None:
    votes = {"name": "votes", "path": str(write_preferences(tmp_path / "votes.jsonl"))}
    asked = {"method": "reward", "datasets": [votes], "evaluation": {"suites": []}, **FULL}
    judge = write_job(tmp_path / "judge", **asked, **RARELY)
    assert run(judge) == 0
    (artifact,) = judge.artifacts
    rules = {**REWARDED["rl"], "rewards": [], "reward_model": str(artifact)}
    alone = rewarded(tmp_path / "alone", 1, tensor=1, method="grpo", rl=rules)
    assert run(alone) == 0
    spread = rewarded(tmp_path / "spread", 2, tensor=2, method="grpo", rl=rules)
    assert exit_codes(start_workers(spread, 2)) == [0, 0]
    assert_same_answers(spread, alone)


@pytest.mark.parametrize("tensor", [2, 1], ids=["ranks of a copy", "copies"])
def test_all_workers_stop_while_they_draw_answers(tmp_path: Path, tensor: int) -> None:
    # That is what nearly all of a step's time goes to.
    rules = {**REWARDED["rl"], "max_new_tokens": 100}
    endless = {"hyperparameters": {**REWARDED["hyperparameters"], "max_steps": 100_000}}
    job = rewarded(tmp_path / "job", 2, tensor=tensor, method="grpo", rl=rules, **endless)
    ranks = start_workers(job, 2)
    wait_for_step(job, 1)
    ranks[1].terminate()
    assert exit_codes(ranks) == [75, 75]
    newest = sorted(job.checkpoints.glob("step-*"))[-1]
    assert int(newest.name.removeprefix("step-")) == read_curve(job)[-1].step


@pytest.mark.parametrize("tensor", [2, 1], ids=["ranks of a copy", "copies"])
def test_two_workers_answer_their_teacher_as_one_does(tmp_path: Path, tensor: int) -> None:
    teacher = write_tiny_model(tmp_path / "teacher", width=96, heads=6)
    rules = {"teacher": str(teacher), "on_policy": True, "max_new_tokens": 8}
    asked = {**LORA, **RARELY, "method": "distill", "distill": rules,
             "hyperparameters": {"max_steps": 3}}  # fmt: skip
    alone = write_job(tmp_path / "alone", **asked)
    assert run(alone) == 0
    spread = write_job(tmp_path / "spread", parallelism={"tensor": tensor}, **asked)
    assert exit_codes(start_workers(spread, 2)) == [0, 0]
    assert_same_answers(spread, alone)
