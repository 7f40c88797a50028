"""The status of a job through its life, read as a table of phases and conditions."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mizzen.operator.controllers.finetunejob import progress_of
from mizzen.operator.planning.generations import (
    AskToYield,
    Dismiss,
    Finish,
    Generation,
    GiveUp,
    Outcome,
    Queue,
    Rest,
    Start,
    WaitUntil,
    Watch,
)
from mizzen.operator.planning.lending import Hold, Wait
from mizzen.operator.status.finetunejob import for_people, has_ended, next_status
from mizzen.operator.status.job_facts import JobFacts, Lending, Problem, Promotion
from mizzen.operator.status.progress import Progress, parse_progress
from mizzen.operator.status.reasons import Reason

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RUNNING = Generation(1, Outcome.RUNNING)
WORKING = parse_progress(
    {"phase": "Running", "step": 12, "totalSteps": 40, "loss": 2.5, "etaSeconds": 250}
)
ARTIFACT = {"kind": "adapter", "path": "/mnt/pvc/models/a", "digest": "sha256:1", "bytes": 9}
BETTER = {"suite": "holdout", "base": 10, "candidate": 8, "regressionRatio": -0.2, "passed": True}
WORSE = {"suite": "holdout", "base": 10, "candidate": 12, "regressionRatio": 0.2, "passed": False}
DONE = parse_progress({"phase": "Succeeded", "step": 40, "totalSteps": 40,
                       "evaluation": [BETTER], "artifact": ARTIFACT})  # fmt: skip
REGRESSED = parse_progress({"phase": "Succeeded", "step": 40, "evaluation": [WORSE]})
WARNED = parse_progress({"phase": "Succeeded", "evaluation": [WORSE], "artifact": ARTIFACT})
PROMOTED = Promotion("smollm2", "support", ready_replicas=2, replicas=2)
MISSING = Problem(Reason.DATASET_NOT_FOUND, "ConfigMap tickets does not exist.")
BASE = JobFacts(
    step=Watch(), newest=RUNNING, is_suspended=False, problem=None, progress=None,
    artifact_uri=None, copies=(), has_suites=True, promotion=None,
)  # fmt: skip
END = replace(BASE, step=Finish(), newest=Generation(1, Outcome.DONE))

CASES = {
    "a job that lacks its data waits and says so": (
        replace(BASE, step=None, newest=None, problem=MISSING), "Pending",
        {"Accepted": "False", "Ready": "False", "Stalled": "True", "Failed": "False"},
    ),
    "a new job is pending": (
        replace(BASE, step=Start(1, 0), newest=None), "Pending",
        {"Accepted": "True", "Admitted": "False", "Reconciling": "True"},
    ),
    "a silent trainer is preparing": (BASE, "Preparing", {"Running": "True"}),
    "a working trainer is running": (
        replace(BASE, progress=WORKING), "Running", {"Running": "True", "Succeeded": "False"},
    ),
    "suspending yields first": (
        replace(BASE, step=AskToYield(), is_suspended=True), "Yielding", {"Suspended": "False"},
    ),
    "workers that give back what they hold yield until the last of them has left": (
        replace(BASE, step=Dismiss(), newest=Generation(1, Outcome.ENDING),
                lending=Lending(is_reclaimed=True)),
        "Yielding", {"Admitted": "False", "Running": "True"},
    ),
    "then rests": (
        replace(BASE, step=Rest(), newest=Generation(1, Outcome.YIELDED), is_suspended=True),
        "Suspended", {"Suspended": "True", "Running": "False"},
    ),
    "a crash waits for its back-off": (
        replace(BASE, step=WaitUntil(NOW, 1), newest=Generation(1, Outcome.CRASHED)),
        "Pending", {"Failed": "False"},
    ),
    "too many crashes fail": (
        replace(BASE, step=GiveUp(7), newest=Generation(7, Outcome.CRASHED)),
        "Failed", {"Failed": "True", "Stalled": "True", "Ready": "False"},
    ),
    "done without a promotion is a success": (
        replace(END, progress=DONE, artifact_uri="pvc://models/a"), "Succeeded",
        {"Succeeded": "True", "Published": "True", "EvaluationPassed": "True", "Ready": "True"},
    ),
    "done is promoted next": (
        replace(END, progress=DONE, artifact_uri="pvc://models/a",
                promotion=replace(PROMOTED, ready_replicas=1)),
        "Promoting", {"Published": "True", "Promoted": "False", "Succeeded": "False"},
    ),
    "promoted everywhere is a success": (
        replace(END, progress=DONE, artifact_uri="pvc://models/a", promotion=PROMOTED),
        "Succeeded", {"Promoted": "True", "Succeeded": "True"},
    ),
    "a deployment without replicas has not got it": (
        replace(END, progress=DONE, promotion=replace(PROMOTED, ready_replicas=0, replicas=0)),
        "Promoting", {"Promoted": "False"},
    ),
    "replaced by a later job's result is a success too": (
        replace(END, progress=DONE, promotion=replace(PROMOTED, replaced_by="better")),
        "Succeeded", {"Promoted": "False", "Published": "True"},
    ),
    "a rollback fails the job, whose result stays published": (
        replace(END, progress=DONE, artifact_uri="pvc://models/a", promotion=Promotion(
            "smollm2", "smollm2",
            problem=Problem(Reason.ROLLED_BACK, "Too many errors.", is_final=True))),
        "Failed", {"Promoted": "False", "Published": "True", "Failed": "True"},
    ),
    "a regression fails the job and publishes nothing": (
        replace(END, progress=REGRESSED, promotion=None), "Failed",
        {"Failed": "True", "EvaluationPassed": "False", "Published": "False"},
    ),
    "a regression of which the gate only warns is published": (
        replace(END, progress=WARNED, artifact_uri="pvc://models/a"), "Succeeded",
        {"EvaluationPassed": "False", "Published": "True", "Failed": "False"},
    ),
}  # fmt: skip


def conditions_of(status: dict[str, Any]) -> dict[str, str]:
    return {entry["type"]: entry["status"] for entry in status["conditions"]}


@pytest.mark.parametrize(("facts", "phase", "conditions"), CASES.values(), ids=CASES)
def test_next_status(facts: JobFacts, phase: str, conditions: dict[str, str]) -> None:
    status = next_status({}, facts, generation=1, now=NOW)
    assert status["phase"] == phase
    assert conditions.items() <= conditions_of(status).items()


@pytest.mark.parametrize("facts", [case[0] for case in CASES.values()], ids=CASES)
def test_the_same_facts_write_the_same_status(facts: JobFacts) -> None:
    first = next_status({}, facts, generation=1, now=NOW)
    assert next_status(first, facts, generation=1, now=NOW + timedelta(hours=1)) == first


def test_what_a_job_waits_for_is_its_reason_not_to_be_ready() -> None:
    wait = Wait(Hold.NO_ROOM, "No node has room.")
    status = next_status({}, replace(BASE, step=Queue(wait)), generation=1, now=NOW)
    ready = next(entry for entry in status["conditions"] if entry["type"] == "Ready")
    assert (ready["reason"], ready["message"]) == ("NoSpareCapacity", wait.message)


MESSAGES = {
    "the figures that passed": (DONE, "The result passes every suite: holdout 8 (base 10)."),
    "the figures that blocked it": (
        REGRESSED,
        "The result is worse than maxRegressionRatio allows: holdout 12 (base 10). Nothing was "
        "published. Change the data or the learning rate and submit a new job.",
    ),
    "the figures it was published in spite of": (
        WARNED,
        "The result is worse than maxRegressionRatio allows: holdout 12 (base 10). It was "
        "published all the same, as evaluation.onFail is Warn.",
    ),
}


@pytest.mark.parametrize(("progress", "message"), MESSAGES.values(), ids=MESSAGES)
def test_the_gate_says(progress: Progress, message: str) -> None:
    status: dict[str, Any] = next_status({}, replace(END, progress=progress), generation=1, now=NOW)
    (said,) = [one for one in status["conditions"] if one["type"] == "EvaluationPassed"]
    assert said["message"] == message


def test_a_job_that_its_budget_ended_is_complete_and_says_so_for_ever() -> None:
    spent = replace(DONE, budget_spent="maxTokens")
    facts = replace(END, progress=spent, artifact_uri="pvc://models/a")
    status: dict[str, Any] = next_status({}, facts, generation=1, now=NOW)
    assert status["phase"] == "Succeeded"
    later = replace(facts, progress=progress_of(status))
    assert next_status(status, later, generation=1, now=NOW) == status
    told = {one["type"]: one for one in status["conditions"]}
    assert told["Succeeded"]["status"] == told["Ready"]["status"] == "True"
    assert told["Succeeded"]["reason"] == told["Ready"]["reason"] == "BudgetSpent"
    assert told["Succeeded"]["message"] == (
        "The job is complete: budget.maxTokens ended it before its last step, and what it had "
        "learned by then is the result."
    )


def test_utilization_is_shown_while_a_trainer_is_at_work() -> None:
    working = replace(WORKING, numbers={**WORKING.numbers, "mfuRatio": 0.41237})
    status: Any = next_status({}, replace(BASE, progress=working), generation=1, now=NOW)
    assert status["progress"]["mfuRatio"] == 0.4124


@pytest.mark.parametrize(("skipped", "shown"), [(0, None), (8, 8)])
def test_samples_that_were_skipped_are_shown_where_there_are_any(
    skipped: int, shown: int | None
) -> None:
    document = {"phase": "Running", "step": 12, "totalSteps": 40, "skippedSamples": skipped}
    working = replace(BASE, progress=parse_progress(document))
    status: Any = next_status({}, working, generation=1, now=NOW)
    assert status["progress"].get("skippedSamples") == shown


def test_progress_speaks_to_people() -> None:
    status = next_status({}, replace(BASE, progress=WORKING), generation=1, now=NOW)
    assert status["progress"] == {
        "step": 12, "totalSteps": 40, "steps": "12/40", "percent": 30,
        "etaSeconds": 250, "eta": "4m10s",
    }  # fmt: skip
    assert status["metrics"] == {"loss": 2.5}


def test_what_a_trainer_reported_outlives_its_pod() -> None:
    before = next_status({}, replace(BASE, progress=WORKING), generation=1, now=NOW)
    after = next_status(before, replace(BASE, step=Start(2, 1)), generation=1, now=NOW)
    assert after["progress"] == before["progress"]
    assert after["restarts"] == 1


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (replace(BASE, progress=WORKING), False),
        (replace(END, progress=DONE, promotion=PROMOTED), True),
        (replace(END, progress=DONE, promotion=replace(PROMOTED, ready_replicas=0)), True),
        (replace(END, progress=REGRESSED), True),
        (replace(BASE, step=GiveUp(3)), True),
    ],
)
def test_a_finished_job_never_trains_again(facts: JobFacts, expected: bool) -> None:
    assert has_ended(next_status({}, facts, generation=1, now=NOW)) is expected


def test_a_document_without_a_phase_is_no_progress() -> None:
    with pytest.raises(ValueError, match="phase"):
        parse_progress({"step": 3})


def test_a_trainer_that_is_silent_for_a_moment_is_still_at_it() -> None:
    evaluating = parse_progress({"phase": "Evaluating", "step": 40})
    before = next_status({}, replace(BASE, progress=evaluating), generation=1, now=NOW)
    assert next_status(before, BASE, generation=1, now=NOW)["phase"] == "Evaluating"


def test_unknown_numbers_are_absent_not_zero() -> None:
    assert parse_progress({"phase": "Running", "loss": None}) == Progress(phase="Running")


def test_a_number_that_no_status_can_hold_is_unknown_too() -> None:
    document = json.loads('{"phase": "Running", "step": 4, "loss": NaN, "kl": Infinity}')
    assert parse_progress(document).numbers == {"step": 4}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (45, "45s"), (250, "4m10s"), (7500, "2h5m")]
)
def test_durations_read_like_ages(seconds: int, text: str) -> None:
    assert for_people(seconds) == text
