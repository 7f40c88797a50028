"""What the admin port says, to whom, and how a wish to stop reaches the loop."""

import asyncio
import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mizzen.runtime.train.admin import AdminServer
from mizzen.runtime.train.checkpoint import Committed, Counters
from mizzen.runtime.train.curve import StepRecord
from mizzen.runtime.train.progress import (
    TERMINATION_LOG_BYTES,
    Artifact,
    ProgressBoard,
    Verdict,
    fit_termination_log,
)
from mizzen.runtime.train.stop import StopFlag, YieldRequested

TOKEN = {"Authorization": "Bearer secret"}


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def record(step: int, tokens: int) -> StepRecord:
    return StepRecord(step=step, loss=2.5, lr=0.1, grad_norm=1.0, tokens=tokens)


def test_nothing_is_known_before_it_was_measured() -> None:
    document = ProgressBoard(generation=3).document()
    assert document.pop("phase") == "Preparing"
    assert document.pop("generation") == 3
    assert document.pop("evaluation") == []
    assert set(document.values()) == {None}


def test_the_time_left_follows_from_the_steps_of_this_generation() -> None:
    clock = Clock()
    board = ProgressBoard(generation=1, clock=clock)
    # Resumed: 1,000 tokens were another generation's and say nothing about our speed.
    board.plan(
        counters=Counters(step=10, samples=80, tokens=1000),
        total_steps=40,
        epoch=0.5,
        last=record(10, 1000),
    )
    assert board.document()["loss"] == 2.5
    assert board.document()["etaSeconds"] is None
    for step in (11, 12):
        clock.now_s += 3.0
        board.advance(record(step, 1000 + 60 * (step - 10)), epoch=0.6)
    document = board.document()
    assert (document["step"], document["totalSteps"]) == (12, 40)
    assert document["tokensPerSecond"] == 20.0
    assert document["etaSeconds"] == 84


def test_what_is_no_finite_number_is_not_known() -> None:
    board = ProgressBoard(generation=1)
    board.plan(counters=Counters(), total_steps=4, epoch=0.0, last=None)
    board.advance(replace(record(1, 60), measured={"kl": math.inf, "reward": 0.5}), epoch=0.2)
    board.evaluated(eval_loss=math.nan, verdicts=[])
    document = board.document()
    assert (document["kl"], document["reward"], document["evalLoss"]) == (None, 0.5, None)
    assert json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(("peak", "ratio"), [(80.0, 0.25), (None, None)])
def test_utilization_is_measured_speed_over_the_devices_best_where_that_is_known(
    peak: float | None, ratio: float | None
) -> None:
    clock = Clock()
    board = ProgressBoard(generation=1, clock=clock)
    board.peak(peak)
    board.plan(counters=Counters(), total_steps=4, epoch=0.0, last=None)
    clock.now_s += 3.0
    board.advance(record(1, 60), epoch=0.2)
    assert board.document()["mfuRatio"] == ratio


def full_board(*, suites: int) -> ProgressBoard:
    board = ProgressBoard(generation=1)
    verdict = Verdict(
        suite="holdout",
        base=14.7,
        candidate=12.1,
        regression_ratio=-0.18,
        samples=40,
        passed=True,
    )
    board.evaluated(eval_loss=2.4, verdicts=[verdict] * suites)
    board.published(Artifact(kind="adapter", path="/mnt/a", digest="sha256:ab", bytes=12))
    board.committed(Committed(step=8, committed_at="2026-01-01T00:00:00Z", path=Path("/x")))
    board.enter("Succeeded")
    return board


def test_the_document_is_the_one_the_operator_reads() -> None:
    document = full_board(suites=1).document()
    assert document["evaluation"] == [
        {
            "suite": "holdout",
            "base": 14.7,
            "candidate": 12.1,
            "regressionRatio": -0.18,
            "samples": 40,
            "passed": True,
        }
    ]
    assert document["artifact"] == {
        "kind": "adapter",
        "path": "/mnt/a",
        "digest": "sha256:ab",
        "bytes": 12,
        "copies": (),
    }
    assert document["checkpoint"] == {"step": 8, "committedAt": "2026-01-01T00:00:00Z"}
    assert document["etaSeconds"] == 0


def test_the_last_word_fits_a_termination_log_with_any_number_of_suites() -> None:
    text = fit_termination_log(full_board(suites=500).document())
    assert len(text.encode()) <= TERMINATION_LOG_BYTES
    assert json.loads(text)["artifact"]["path"] == "/mnt/a"


@pytest.fixture
def admin(tmp_path: Path) -> tuple[str, StopFlag]:
    (tmp_path / "token").write_text("secret\n")
    stop = StopFlag()
    server = AdminServer(full_board(suites=1), stop, token_file=tmp_path / "token")
    server.start(0)
    return f"http://127.0.0.1:{server.port}", stop


async def ask(method: str, url: str, **options: object) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, **options) as answer,  # type: ignore[arg-type]
    ):
        return answer.status, await answer.text()


def wait_until_asked(stop: StopFlag) -> None:
    while not stop.is_asked:
        time.sleep(0.01)


async def test_health_and_metrics_are_open(admin: tuple[str, StopFlag]) -> None:
    url, _ = admin
    assert await ask("GET", f"{url}/healthz") == (200, "ok")
    status, text = await ask("GET", f"{url}/metrics")
    names = {family.name for family in text_string_to_metric_families(text)}
    assert status == 200
    # Only what is known: this job has an end, but no step was measured.
    assert names == {"mizzen_train_eta_seconds", "mizzen_train_eval_loss"}


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": ""}])
@pytest.mark.parametrize(("method", "path"), [("GET", "/progress"), ("POST", "/yield")])
async def test_the_rest_needs_the_token(
    admin: tuple[str, StopFlag], method: str, path: str, headers: dict[str, str]
) -> None:
    url, stop = admin
    status, text = await ask(method, url + path, headers=headers)
    assert (status, stop.is_asked) == (401, False)
    assert json.loads(text)["error"] == "The admin token is missing or wrong."


async def test_without_a_token_file_nobody_is_let_in(tmp_path: Path) -> None:
    server = AdminServer(full_board(suites=1), StopFlag(), token_file=tmp_path / "none")
    server.start(0)
    headers = {"Authorization": "Bearer "}
    status, _ = await ask("GET", f"http://127.0.0.1:{server.port}/progress", headers=headers)
    assert status == 401


async def test_a_yield_is_accepted_and_raises_the_flag(admin: tuple[str, StopFlag]) -> None:
    url, stop = admin
    body = {"deadlineSeconds": 15}
    status, _ = await ask("POST", f"{url}/yield", headers=TOKEN, json=body)
    assert status == 202
    await asyncio.to_thread(wait_until_asked, stop)
    with pytest.raises(YieldRequested):
        stop.check()


@pytest.mark.parametrize("body", ["nonsense", "[]", '{"deadlineSeconds": "soon"}'])
async def test_a_yield_nobody_can_read_changes_nothing(
    admin: tuple[str, StopFlag], body: str
) -> None:
    url, stop = admin
    status, _ = await ask("POST", f"{url}/yield", headers=TOKEN, data=body)
    assert (status, stop.is_asked) == (400, False)


def test_a_signal_raises_the_flag() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = StopFlag()
    try:
        stop.listen_to_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until_asked(stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_port_in_use_is_an_error_at_the_start(admin: tuple[str, StopFlag]) -> None:
    url, stop = admin
    server = AdminServer(full_board(suites=1), stop, token_file=Path("/none"))
    with pytest.raises(OSError, match="address already in use"):
        server.start(int(url.rpartition(":")[2]))
