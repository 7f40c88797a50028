"""What a gate can ask beside a method's own measure, and what is held out for it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mizzen.runtime.train.config import Suite, TrainConfig
from mizzen.runtime.train.decontaminate import find_contaminated
from mizzen.runtime.train.errors import JobConfigError, JudgeFailedError, JudgeUnreachableError
from mizzen.runtime.train.options import ServedModel
from mizzen.runtime.train.records import Conversation, RecordReader
from mizzen.runtime.train.samples import Prompt
from mizzen.runtime.train.stop import StopFlag, YieldRequested
from mizzen.runtime.train.suites.answers import Preference, WinRate
from mizzen.runtime.train.suites.classification import choose_labels
from mizzen.runtime.train.suites.exam import Question, Subject
from mizzen.runtime.train.suites.judge import HttpJudge
from tests.fixtures.train_runs import WORDS, Job, run, write_job

ASKED = ({"role": "user", "content": "Which colour?"},)


def write_labelled(path: Path, count: int = 64) -> Path:
    """Write questions whose answer is the first word's half of the list of colours."""
    rows = []
    for index in range(count):
        word = WORDS[index % 8]
        rows.append({"prompt": f"{index} {word}?", "completion": "warm" if index % 8 < 4 else "no"})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def labelled_job(root: Path, *suites: dict[str, Any], **overrides: Any) -> Job:
    root.mkdir(parents=True, exist_ok=True)
    return write_job(
        root,
        datasets=[{"name": "colours", "path": str(write_labelled(root / "labelled.jsonl"))}],
        evaluation={"suites": list(suites), **overrides.pop("evaluation", {})},
        hyperparameters={
            "max_steps": 40,
            "batch_size": 8,
            "micro_batch": 8,
            **overrides.pop("hyperparameters", {}),
        },
        **overrides,
    )


def suites_of(job: Job) -> dict[str, dict[str, Any]]:
    return {suite["suite"]: suite for suite in job.last_word["evaluation"]}


def test_an_adapter_that_learned_the_labels_passes_classification_and_exact_match(
    tmp_path: Path,
) -> None:
    job = labelled_job(
        tmp_path,
        {"name": "labels", "type": "classification", "max_regression_ratio": -0.2},
        {"name": "words", "type": "exactMatch", "max_new_tokens": 8},
    )
    assert run(job) == 0
    labels, words = suites_of(job).values()
    assert labels["passed"] and labels["candidate"] > labels["base"]
    assert words["passed"] and words["candidate"] > 0.5 and words["base"] == 0.0
    assert labels["samples"] == job.last_word["dataset"]["holdout"] > 3


def test_a_suite_that_fails_blocks_publication_unless_it_may_only_warn(tmp_path: Path) -> None:
    demanding = {"name": "labels", "type": "classification", "max_regression_ratio": -0.5}
    idle = {"max_steps": 1, "learning_rate": 1e-9}
    blocked = labelled_job(tmp_path / "block", demanding, {"name": "loss"}, hyperparameters=idle)
    assert run(blocked) == 0
    assert not suites_of(blocked)["labels"]["passed"]
    assert blocked.artifacts == []
    warned = labelled_job(
        tmp_path / "warn", demanding, hyperparameters=idle, evaluation={"on_fail": "Warn"}
    )
    assert run(warned) == 0
    assert not suites_of(warned)["labels"]["passed"]
    assert len(warned.artifacts) == 1
    assert warned.last_word["artifact"]["path"] == str(warned.artifacts[0])


def test_answers_without_labels_are_refused_by_classification(tmp_path: Path) -> None:
    job = write_job(
        tmp_path,
        evaluation={"suites": [{"name": "labels", "type": "classification", "labels": ["a"]}]},
    )
    assert run(job) == 42
    assert not job.artifacts


def question(answer: str | None) -> Question:
    prompt = Prompt(np.arange(3, dtype=np.int32), answer)
    return Question(messages=ASKED, prompt=prompt, place="line 1")


def test_labels_are_the_answers_there_are_unless_the_suite_names_them() -> None:
    asked = [question("yes"), question("no"), question("yes")]
    assert choose_labels(Suite(name="s", type="classification"), asked) == ("no", "yes")
    named = Suite(name="s", type="classification", labels=("yes", "maybe", "no"))
    assert choose_labels(named, asked) == ("yes", "maybe", "no")


@pytest.mark.parametrize(
    ("labels", "answers", "sentence"),
    [
        (("yes",), ("yes", "perhaps"), "a held-out sample's answer is 'perhaps'"),
        ((), ("yes",), "finds 1 different answers"),
        ((), tuple(map(str, range(40))), "finds 40 different answers"),
    ],
)
def test_answers_that_are_no_labels_are_refused(
    labels: tuple[str, ...], answers: tuple[str, ...], sentence: str
) -> None:
    suite = Suite(name="s", type="classification", labels=labels)
    with pytest.raises(JobConfigError, match=sentence):
        choose_labels(suite, [question(answer) for answer in answers])


# Win rate


class _Speaker:
    """Says what it was told to."""

    def __init__(self, *answers: str) -> None:
        self._answers = list(answers)

    def answers(self, subject: Subject, questions: Any) -> list[str]:
        return [self._answers.pop(0) for _ in questions]


class _Judge:
    """Prefers by a rule; remembers what it saw."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.seen: list[tuple[str, str]] = []

    def compare(self, messages: Any, pairs: Any, stop: StopFlag) -> list[Preference]:
        self.seen += pairs
        return [self.rule(*pair) for pair in pairs]


RULES = {
    "the candidate's answer wins in both orders": (
        lambda first, _: "first" if first == "own" else "second", 1.0),
    "the base's answer wins in both orders": (
        lambda first, _: "second" if first == "own" else "first", 0.0),
    "a judge that takes whatever stands first has no preference": (lambda *_: "first", 0.5),
    "a tie is half a win": (lambda *_: "tie", 0.5),
    "a win in one order and a tie in the other": (
        lambda first, _: "first" if first == "own" else "tie", 0.75),
}  # fmt: skip


@pytest.mark.parametrize(("rule", "wins"), RULES.values(), ids=RULES)
def test_a_pair_is_judged_in_both_orders(rule: Any, wins: float) -> None:
    judge, subject = _Judge(rule), Subject(decoder=None)  # type: ignore[arg-type]
    suite = Suite(name="s", type="winRate")
    exam = WinRate(suite, [question(None)], _Speaker("own"), judge, StopFlag())  # type: ignore[arg-type]
    count = exam.count(subject, slice(0, 1), ["base"])
    assert (count.total, count.weight) == (wins, 1.0)
    assert judge.seen == [("own", "base"), ("base", "own")]


def test_the_base_wins_half_and_equal_answers_need_no_judge() -> None:
    judge, subject = _Judge(None), Subject(decoder=None)  # type: ignore[arg-type]
    suite = Suite(name="s", type="winRate")
    asked = [question(None), question(None)]
    speaker = _Speaker("a", "b", "a", "b")
    exam = WinRate(suite, asked, speaker, judge, StopFlag())  # type: ignore[arg-type]
    base = exam.count(subject, slice(0, 2), None)
    assert (base.total, base.weight, base.answers) == (1.0, 2.0, ("a", "b"))
    assert exam.count(subject, slice(0, 2), base.answers).total == 1.0


@contextmanager
def running_judge(*replies: tuple[int, str]) -> Iterator[tuple[ServedModel, list[dict[str, Any]]]]:
    """Serve these replies one after the other, the last one again and again."""
    left, requests = list(replies), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append({**json.loads(body), "key": self.headers.get("Authorization")})
            status, text = left.pop(0) if len(left) > 1 else left[0]
            said = {"choices": [{"message": {"content": text}}]}
            content = json.dumps(said if status == 200 else {"error": {"code": text}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield ServedModel(url=f"http://127.0.0.1:{server.server_port}", model="judge"), requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


VERDICT = json.dumps({"better": "A"})


def test_a_judge_is_asked_through_its_address_with_its_key_and_a_schema() -> None:
    with running_judge((503, ""), (200, VERDICT)) as (config, requests):
        judge = HttpJudge(config, api_key="secret")
        assert judge.compare(ASKED, [("left", "right")], StopFlag()) == ["first"]
    assert len(requests) == 2  # a 503 is tried again
    asked = requests[-1]
    assert (asked["model"], asked["temperature"], asked["key"]) == ("judge", 0, "Bearer secret")
    assert asked["response_format"]["json_schema"]["strict"]
    text = asked["messages"][0]["content"]
    assert text.index("left") < text.index("right") and "Which colour?" in text


@pytest.mark.parametrize(
    "reply", [(404, "no such model"), (200, "I like both"), (500, "generation_failed")]
)
def test_a_judge_that_gives_no_verdict_ends_the_job_with_what_it_said(
    reply: tuple[int, str],
) -> None:
    with running_judge(reply) as (config, requests):
        with pytest.raises(JudgeFailedError, match=reply[1]):
            HttpJudge(config, api_key=None).compare(ASKED, [("a", "b")], StopFlag())
        assert len(requests) == 1  # it would say the same again


def test_a_judge_that_stays_away_is_tried_again_by_a_later_generation() -> None:
    with running_judge((503, "")) as (config, _):
        judge = HttpJudge(config, api_key=None, retries=1)
        with pytest.raises(JudgeUnreachableError, match="answers 503"):
            judge.compare(ASKED, [("a", "b")], StopFlag())
    with pytest.raises(JudgeUnreachableError, match="cannot be reached"):
        HttpJudge(config, api_key=None, retries=1).compare(ASKED, [("a", "b")], StopFlag())


def test_a_job_that_is_asked_to_yield_does_not_wait_for_the_judge() -> None:
    stop = StopFlag()
    stop.ask()
    with running_judge((200, VERDICT)) as (config, _), pytest.raises(YieldRequested):
        HttpJudge(config, api_key=None).compare(ASKED, [("a", "b")], stop)


def test_a_win_rate_is_measured_from_a_job(tmp_path: Path) -> None:
    with running_judge((200, json.dumps({"better": "tie"}))) as (config, requests):
        job = labelled_job(
            tmp_path,
            {"name": "liked", "type": "winRate", "max_new_tokens": 4},
            evaluation={"judge": config.model_dump()},
        )
        assert run(job) == 0
        assert requests
    (suite,) = suites_of(job).values()
    assert (suite["base"], suite["candidate"], suite["passed"]) == (0.5, 0.5, True)


@pytest.mark.parametrize(
    ("method", "suite", "sentence"),
    [
        ("sft", "winRate", "needs evaluation.judge"),
        ("sft", "reward", "measured by suites of type classification, exactMatch, perplexity"),
        ("reward", "exactMatch", "measured by suites of type preferenceLoss"),
    ],
)
def test_a_suite_that_cannot_be_asked_is_refused(
    tmp_path: Path, method: str, suite: str, sentence: str
) -> None:
    document = json.loads(write_job(tmp_path).config_path.read_text())
    document |= {"method": method, "evaluation": {"suites": [{"name": "s", "type": suite}]}}
    with pytest.raises(ValueError, match=sentence):
        TrainConfig.model_validate(document)


# Decontamination

LONG = "the quick brown fox jumps over the lazy dog while seven wizards watch from the hill"


def conversations(*texts: str) -> list[Conversation]:
    reader = RecordReader("d", shape="conversation", form="auto")
    rows = [{"prompt": text, "completion": "ok"} for text in texts]
    return [reader.read(f"line {n}", row) for n, row in enumerate(rows, start=1)]


OVERLAPS = {
    "a long run of words in a training sample": (f"Well: {LONG}!", ("Once, " + LONG,), True),
    "the same short text but for case and stops": ("Great film.", ("great FILM",), True),
    "a short text with other words": ("Great film.", ("great music",), False),
    "a long text that begins alike": (LONG[:40] + " ended well", (LONG,), False),
    "wording that many training samples share": (
        f"{LONG} one", tuple(f"{LONG} {n}" for n in range(40)), False),
}  # fmt: skip


@pytest.mark.parametrize(("held", "trained", "is_found"), OVERLAPS.values(), ids=OVERLAPS)
def test_what_contaminates_the_holdout(held: str, trained: tuple[str, ...], is_found: bool) -> None:
    (asked,) = conversations(held)
    found = find_contaminated([asked], conversations(*trained))
    assert found == (frozenset({asked.key}) if is_found else frozenset())
