"""Ranks that share a model ask another one over HTTP: one of them asks, and all go on with it."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine.tokenizer import Tokenizer
from tests.fixtures.asked_models import AskedModel, asked_model
from tests.fixtures.train_runs import Job, exit_codes, run, start_workers, write_job

WAIT_S = 400
PATIENCE_S = 12.0  # of workers with each other; they load a model in that time as well
GROUPS = {"two copies": (2, 1), "two ranks": (2, 2), "two copies of two ranks": (4, 2)}


def judged(root: Path, judge: AskedModel, **overrides: Any) -> Job:
    """Write a job whose answers a judge compares after two quick steps."""
    suite = {"name": "liked", "type": "winRate", "max_new_tokens": 4}
    return write_job(
        root,
        hyperparameters={"max_steps": 2, "learning_rate": 0.05},
        evaluation={"suites": [suite], "judge": judge.where, "on_fail": "Warn"},
        **overrides,
    )


def verdict(better: str) -> tuple[int, dict[str, Any]]:
    content = json.dumps({"better": better})
    return 200, {"choices": [{"message": {"content": content}}]}


def prefer_smaller(document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Like the answer that comes first in the alphabet, wherever it stands."""
    text = document["messages"][0]["content"].partition("[Answer A]\n")[2]
    first, _, second = text.partition("\n\n[Answer B]\n")
    return verdict("A" if first < second.rpartition("\n\nReply")[0] else "B")


def wait_until_asked(model: AskedModel) -> None:
    ends_at = time.monotonic() + WAIT_S
    while not model.asked:
        assert time.monotonic() < ends_at, "nobody asked"
        time.sleep(0.01)


@pytest.mark.parametrize(("workers", "tensor"), GROUPS.values(), ids=GROUPS)
def test_a_judge_is_asked_once_and_its_word_counts_on_all_ranks(
    tmp_path: Path, workers: int, tensor: int
) -> None:
    with asked_model(prefer_smaller) as judge:
        alone = judged(tmp_path / "alone", judge)
        assert run(alone) == 0
        expected = sorted(map(json.dumps, judge.asked))
        del judge.asked[:]
        job = judged(tmp_path / "job", judge, parallelism={"tensor": tensor})
        assert exit_codes(start_workers(job, workers)) == [0] * workers
    assert expected
    assert sorted(map(json.dumps, judge.asked)) == expected
    assert job.last_word["evaluation"] == alone.last_word["evaluation"]


def test_a_judge_may_take_longer_than_ranks_wait_for_each_other(tmp_path: Path) -> None:
    def think_once(document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if len(judge.asked) == 1:
            time.sleep(PATIENCE_S + 3)
        return verdict("tie")

    with asked_model(think_once) as judge:
        failure = {"hang_timeout_s": PATIENCE_S}
        job = judged(tmp_path, judge, parallelism={"tensor": 2}, failure=failure)
        assert exit_codes(start_workers(job, 2)) == [0, 0]
    assert len(judge.asked) > 1
    assert job.last_word["evaluation"][0]["candidate"] == 0.5


@pytest.mark.parametrize("told", [0, 1], ids=["the leader", "another rank"])
def test_all_ranks_yield_while_they_wait_for_a_judge(tmp_path: Path, told: int) -> None:
    is_over = threading.Event()

    def never(_: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        is_over.wait(WAIT_S)
        return verdict("tie")

    with asked_model(never) as judge:
        job = judged(tmp_path, judge, parallelism={"tensor": 2})
        ranks = start_workers(job, 2)
        wait_until_asked(judge)
        ranks[told].terminate()
        assert exit_codes(ranks) == [75, 75]
        is_over.set()
    assert [path.name for path in job.checkpoints.glob("step-*")] == ["step-00000002"]


def test_a_judge_that_refuses_ends_the_job_on_all_ranks(tmp_path: Path) -> None:
    with asked_model(lambda _: (404, {"error": "no such model"})) as judge:
        job = judged(tmp_path, judge, parallelism={"tensor": 2})
        assert exit_codes(start_workers(job, 2)) == [42, 76]
    assert job.last_word["reason"] == "JudgeFailed"


def taught(root: Path, teacher: AskedModel, *, on_policy: bool, **overrides: Any) -> Job:
    served = {"served": teacher.where, "samples": 2, "on_policy": on_policy, "max_new_tokens": 4}
    return write_job(
        root,
        method="distill",
        distill=served,
        hyperparameters={"max_steps": 2},
        evaluation={"suites": []},
        **overrides,
    )


def teach(vocabulary: str, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Find every token as likely as its id says, and draw it and the id of half its number."""
    ids = document["prompt"]
    choice = {
        "prompt_samples": [None, *([one, one // 2] for one in ids[1:])],
        "prompt_logprobs": [None, *({str(one): {"logprob": -one / 100}} for one in ids[1:])],
    }
    return 200, {"vocabulary": vocabulary, "choices": [choice]}


def vocabulary_of(root: Path) -> str:
    return Tokenizer.load(write_tiny_model(root / "digest")).vocabulary_digest


@pytest.mark.parametrize("on_policy", [False, True], ids=["noted", "on policy"])
@pytest.mark.parametrize(("workers", "tensor"), GROUPS.values(), ids=GROUPS)
def test_no_two_workers_ask_a_teacher_the_same(
    tmp_path: Path, workers: int, tensor: int, on_policy: bool
) -> None:
    digest = vocabulary_of(tmp_path)
    with asked_model(lambda document: teach(digest, document)) as teacher:
        alone = taught(tmp_path / "alone", teacher, on_policy=on_policy)
        assert run(alone) == 0
        expected = sorted(map(json.dumps, teacher.asked))
        del teacher.asked[:]
        spread = {"parallelism": {"tensor": tensor}}
        job = taught(tmp_path / "job", teacher, on_policy=on_policy, **spread)
        assert exit_codes(start_workers(job, workers)) == [0] * workers
    assert expected
    assert sorted(map(json.dumps, teacher.asked)) == expected


AWAY = {
    "from ranks that take notes": (2, 2, False),
    "from one of two copies": (2, 1, True),
    "from one of two copies of two ranks": (4, 2, True),
}


@pytest.mark.parametrize(("workers", "tensor", "on_policy"), AWAY.values(), ids=AWAY)
def test_a_teacher_may_be_away_for_longer_than_workers_wait_for_each_other(
    tmp_path: Path, workers: int, tensor: int, on_policy: bool
) -> None:
    digest = vocabulary_of(tmp_path)

    def sleep_once(document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if len(teacher.asked) == 1:
            time.sleep(PATIENCE_S + 3)
        return teach(digest, document)

    with asked_model(sleep_once) as teacher:
        more = {"parallelism": {"tensor": tensor}, "failure": {"hang_timeout_s": PATIENCE_S}}
        job = taught(tmp_path / "job", teacher, on_policy=on_policy, **more)
        assert exit_codes(start_workers(job, workers)) == [0] * workers


@pytest.mark.parametrize("told", [0, 3], ids=["the leader", "a rank of another copy"])
def test_all_workers_yield_while_they_wait_for_a_teacher(tmp_path: Path, told: int) -> None:
    is_over = threading.Event()

    def never(_: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        is_over.wait(WAIT_S)
        return 503, {}

    with asked_model(never) as teacher:
        job = taught(tmp_path, teacher, on_policy=True, parallelism={"tensor": 2})
        running = start_workers(job, 4)
        wait_until_asked(teacher)
        running[told].terminate()
        assert exit_codes(running) == [75] * 4
        is_over.set()
    assert (job.checkpoints / "step-00000000").exists()


def test_ranks_that_take_notes_leave_at_once_when_asked_to(tmp_path: Path) -> None:
    is_over, digest = threading.Event(), vocabulary_of(tmp_path)

    def never(_: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        is_over.wait(WAIT_S)
        return teach(digest, {"prompt": []})

    with asked_model(never) as teacher:
        job = taught(tmp_path / "job", teacher, on_policy=False, parallelism={"tensor": 2})
        ranks = start_workers(job, 2)
        wait_until_asked(teacher)
        for rank in ranks:
            rank.terminate()
        # The one that is faster may be missed before the other has heard.
        codes = exit_codes(ranks)
        is_over.set()
    assert 75 in codes
    assert set(codes) <= {75, 76}


@pytest.mark.parametrize("on_policy", [False, True], ids=["noted", "on policy"])
def test_a_teacher_that_refuses_ends_the_job_on_all_ranks(tmp_path: Path, on_policy: bool) -> None:
    with asked_model(lambda _: (404, {"error": "no such model"})) as teacher:
        job = taught(tmp_path, teacher, on_policy=on_policy, parallelism={"tensor": 2})
        assert exit_codes(start_workers(job, 2)) == [42, 76]
    assert "refuses to say what it thinks" in job.last_word["message"]
