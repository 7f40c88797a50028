"""The live benchmark of lending: what its leases, sizes and legs come to, and that it tidies up."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lending_live, lent_time
from benchmarks.lending_legs import Leg, Size, rises, summary
from benchmarks.lending_live import Witness, run_leg
from benchmarks.lent_time import Lease, Leases, committed_step, useful_pct
from benchmarks.open_loop import Answer, Limits
from benchmarks.story import Story
from benchmarks.stream_counter import REFUSED, WHOLE
from mizzen.runtime.train.admin import AdminServer
from mizzen.runtime.train.checkpoint import Counters
from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.stop import StopFlag

Json = dict[str, Any]
GOOD, LATE = Answer(WHOLE, 0.5, 0.05), Answer(WHOLE, 1.5, 0.05)
LIMITS = Limits(ttft_s=1.0, itl_s=0.1)

SEEN = {20: 8.0, 21: 10.0, 22: 12.0, 23: 14.0}
USEFUL = {
    "steps count from the first that is new to the last committed": ((SEEN, 18.0, 23), 6.0),
    "a step that was not committed does not": ((SEEN, 18.0, 22), 4.0),
    "a lease in which none was committed is of no use": ((SEEN, 18.0, 20), 0.0),
    "one that never stood before a step is not": (({}, 18.0, 20), 0.0),
    "one that ended without a word is not": ((SEEN, 18.0, None), 0.0),
    "one that goes on is not counted yet": ((SEEN, None, None), 0.0),
}


@pytest.mark.parametrize(("told", "useful_s"), USEFUL.values(), ids=USEFUL)
def test_useful_time_of_a_lease(
    told: tuple[dict[int, float], float | None, int | None], useful_s: float
) -> None:
    steps, ended_at, committed = told
    lease = Lease(2.0, first_at=steps, ended_at=ended_at, committed=committed)
    assert lease.useful_s == useful_s
    assert lease.lent_s == (16.0 if ended_at else 0.0)


def test_the_useful_share_is_of_all_lent_seconds() -> None:
    leases = [
        Lease(0.0, first_at={0: 10.0, 9: 90.0}, ended_at=100.0, committed=9),
        Lease(200.0, first_at={}, ended_at=220.0),
    ]
    assert useful_pct(leases) == pytest.approx(100 * 80 / 120)
    assert useful_pct([]) is None


def pod(*, end: Json | None = None, job: str = "live", **annotations: str) -> Json:
    state = {"terminated": end} if end else {"running": {}}
    return {
        "metadata": {
            "uid": "1", "name": "live-g1-0", "labels": {"mizzen.dev/job": job},
            "annotations": {f"mizzen.dev/{k.replace('_', '-')}": v
                            for k, v in annotations.items()},
        },
        "spec": {},
        "status": {"podIP": "127.0.0.1", "containerStatuses": [{"state": state}]},
    }  # fmt: skip


def test_a_pod_tells_when_devices_were_lent_asked_back_and_free() -> None:
    clock = [5.0]
    leases = Leases("live", lambda: clock[0])
    last_words = json.dumps({"phase": "Running", "checkpoint": {"step": 12}})
    noted = {"reclaimed_at": "2026-11-28T12:00:00Z"}
    ended = pod(end={"exitCode": 75, "message": last_words}, **noted)
    leases.see_pod("ADDED", pod(job="other"))
    assert leases.all == []
    for at_s, kind, document in (
        (5.0, "ADDED", pod()),
        (6.0, "MODIFIED", pod()),
        (60.0, "MODIFIED", pod(**noted)),
        (63.5, "MODIFIED", ended),
        (70.0, "DELETED", ended),
    ):
        clock[0] = at_s
        leases.see_pod(kind, document)
        assert len(leases.open) == (at_s < 63.5)
    (lease,) = leases.all
    assert (lease.lent_at, lease.asked_at, lease.ended_at) == (5.0, 60.0, 63.5)
    assert (lease.yield_s, lease.committed) == (3.5, 12)


def test_a_pod_deleted_at_work_ended_without_a_word_and_nobody_had_asked_it_to() -> None:
    leases = Leases("live", lambda: 1.0)
    leases.see_pod("ADDED", pod())
    leases.see_pod("DELETED", pod())
    (lease,) = leases.all
    assert (lease.ended_at, lease.committed, lease.yield_s) == (1.0, None, None)


@pytest.mark.parametrize("words", ["", "Killed", '{"checkpoint": null}', "{}"])
def test_last_words_may_tell_of_no_checkpoint(words: str) -> None:
    assert committed_step(words) is None


async def test_a_real_trainers_metrics_tell_its_steps_once_its_loop_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = ProgressBoard(generation=1)
    server = AdminServer(board, StopFlag(), token_file=tmp_path / "token")
    server.start(0)
    monkeypatch.setattr(lent_time, "ADMIN_PORT", server.port)
    asked: list[int | None] = []

    async def ask(*arguments: Any) -> int | None:
        asked.append(await ask_really(*arguments))
        return asked[-1]

    ask_really = lent_time._ask_step
    monkeypatch.setattr(lent_time, "_ask_step", ask)
    monkeypatch.setattr(lent_time, "_LOOK_S", 0.01)
    leases = Leases("live", lambda: float(len(asked)))
    leases.see_pod("ADDED", pod())
    following = asyncio.create_task(leases.follow_steps())
    await until(lambda: len(asked) > 1)
    assert asked == [None] * len(asked)
    board.plan(counters=Counters(step=20), total_steps=100, epoch=0.0, last=None)
    await until(lambda: asked[-1] == 20)
    board.plan(counters=Counters(step=21), total_steps=100, epoch=0.0, last=None)
    await until(lambda: asked[-1] == 21)
    following.cancel()
    (lease,) = leases.all
    assert lease.first_at == {20: asked.index(20) + 1, 21: asked.index(21) + 1}


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 - it has no event to wait for
            await asyncio.sleep(0.01)


def test_a_rise_is_over_when_as_many_serve_as_are_wanted() -> None:
    sizes = [Size(0, 1, 1), Size(60, 2, 1), Size(85, 2, 2), Size(90, 1, 2), Size(99, 3, 1)]
    assert rises(sizes) == [(60, 85), (99, float("inf"))]


def leg(*, number: int = 1, lends: bool, answers: list[Answer]) -> Leg:
    leases = [Lease(0.0, first_at={0: 5.0, 9: 95.0}, asked_at=96.0, ended_at=100.0, committed=9)]
    return Leg(
        number, lends, begun_s=10.0, alone=[GOOD], answers=answers,
        sizes=[Size(5, 1, 1), Size(110, 2, 1), Size(130, 2, 2)], leases=leases if lends else [],
    )  # fmt: skip


def test_a_row_tells_what_a_leg_came_to() -> None:
    row = leg(lends=True, answers=[GOOD, GOOD, LATE, Answer(REFUSED)]).row(LIMITS)
    told = {"lending", "attained_pct", "at_0.5x", "at_2x", "rises", "yield_s", "useful_pct"}
    assert {name: row[name] for name in told} == {
        **{"lending": "on", "attained_pct": 50.0, "at_0.5x": 50.0, "at_2x": 75.0},
        **{"rises": "100 to 120 s", "yield_s": "4.0", "useful_pct": 90.0},
    }
    without = leg(lends=False, answers=[GOOD]).row(LIMITS)
    assert (without["lending"], without["lent_s"], without["useful_pct"]) == ("off", 0, None)


def test_the_end_tells_the_points_of_each_round_and_the_useful_share() -> None:
    legs = [
        leg(number=1, lends=False, answers=[GOOD] * 4),
        leg(number=1, lends=True, answers=[GOOD] * 3 + [LATE]),
        leg(number=2, lends=False, answers=[GOOD] * 4),
        leg(number=2, lends=True, answers=[GOOD] * 4),
    ]
    lines = summary(legs, LIMITS)
    assert lines[0] == (
        "within 1000 and 100 ms: -12.50 points by lending (-25.00 to +0.00, standard error 12.50); "
        "at least -0.5"
    )
    assert lines[4].startswith("within 2000 and 200 ms: +0.00 points")
    assert lines[-1] == "of the lent time useful: 90.0 %; at least 85"
    assert summary([*legs[:1], leg(lends=True, answers=[GOOD])], LIMITS)[0].endswith(
        "+0.00 points by lending (+0.00 to +0.00); at least -0.5"
    )


def test_a_witness_sees_its_own_leg_alone_and_each_size_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = Leg(1, lends=True)
    witness = Witness(mine)

    def deployment(name: str, wanted: int, serving: int) -> Json:
        status = {"scaling": {"desired": wanted}, "readyReplicas": serving, "ready": "some"}
        return {"metadata": {"name": name}, "spec": {}, "status": status}

    for name, wanted, serving in (
        *(("other", 3, 3), (mine.name, 1, 1), (mine.name, 1, 1)),
        *((mine.name, 2, 1), (mine.name, 2, 2)),
    ):
        document = deployment(name, wanted, serving)
        witness.see_resource("LLMDeployment", "MODIFIED", document)
    witness.see_resource("FineTuneJob", "DELETED", {"metadata": {"name": mine.name}})
    witness.see_pod("ADDED", pod(job=mine.name))
    witness.see_pod("ADDED", pod(job="other"))
    assert [(size.wanted, size.serving) for size in mine.sizes] == [(1, 1), (2, 1), (2, 2)]
    lines = [line.split(" s  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        f"LLMDeployment/{mine.name}: some ready, 1 wanted, None; adapters []",
        f"LLMDeployment/{mine.name}: some ready, 2 wanted, None; adapters []",
        f"FineTuneJob/{mine.name}: gone",
        "Pod/live-g1-0: None, not in service",
    ]
    assert len(witness.leases.all) == 1


STATES: dict[str, tuple[Json, str]] = {
    "a pod that waits for devices": (
        {"spec": {"schedulingGates": [{"name": "mizzen.dev/capacity"}]}, "status": {}},
        "held by mizzen.dev/capacity",
    ),
    "a pod that gave way": (
        pod(end={"exitCode": 75}),
        "ended, exit code 75",
    ),
    "a pod in service": (
        {"spec": {}, "status": {"phase": "Running",
                                "conditions": [{"type": "Ready", "status": "True"}]}},
        "Running, in service",
    ),
    "a job that waits": (
        {"kind": "FineTuneJob", "status": {"phase": "Pending", "progress": {"step": 17}}},
        "Pending, committed step 17",
    ),
    "a job at work": (
        {"kind": "FineTuneJob", "status": {
            "phase": "Running", "progress": {"step": 17},
            "conditions": [{"type": "Admitted", "status": "True", "reason": "Lent"}]}},
        "Running, past step 10, Admitted True (Lent)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("resource", "text"), STATES.values(), ids=STATES)
def test_a_story_tells_a_state_in_short_and_once(
    resource: Json, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    story = Story()
    named = {"kind": "Pod", "metadata": {"name": "x"}, **resource}
    story.tell(named)
    story.tell(named)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f"{named['metadata']['name']}: {text}")


class QuietApi:
    """An API server on which nothing happens."""

    async def watch(self, path: str, seen: Callable[[str, Json], None]) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("is_interrupted", [True, False])
async def test_a_leg_that_ends_early_leaves_nothing(
    is_interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    applied = asyncio.Event()

    async def apply(*_: object) -> None:
        applied.set()
        if not is_interrupted:
            raise RuntimeError("kubectl apply refused live")
        await asyncio.Event().wait()

    async def remove(cluster: lending_live.Deployment) -> None:
        removed.append(cluster.name)

    monkeypatch.setattr(lending_live, "apply", apply)
    monkeypatch.setattr(lending_live, "remove", remove)
    options = argparse.Namespace(namespace="team", api_key="", concurrency=2)
    mine = Leg(1, lends=False)
    task = asyncio.create_task(run_leg(mine, QuietApi(), "http://127.0.0.1:1", options))
    await applied.wait()
    if is_interrupted:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="apply refused")):
            await task
    assert removed == [mine.name]


async def test_a_signal_ends_a_run_as_an_error_would(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    applied = asyncio.Event()

    async def apply(*_: object) -> None:
        applied.set()
        await asyncio.Event().wait()

    async def remove(cluster: lending_live.Deployment) -> None:
        removed.append(cluster.name)

    async def open_client() -> nullcontext[None]:
        return nullcontext()

    replaced = {"apply": apply, "remove": remove, "open_client": open_client}
    for name, replacement in replaced.items():
        monkeypatch.setattr(lending_live, name, replacement)
    monkeypatch.setattr(lending_live, "Api", lambda _: QuietApi())
    options = argparse.Namespace(
        **{"namespace": "team", "api_key": "", "concurrency": 2, "rounds": 1},
        **{"url": "http://127.0.0.1:1", "ttft_ms": 1000, "itl_ms": 100},
    )
    task = asyncio.create_task(lending_live.run(options))
    await applied.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert removed == [Leg(1, lends=False).name]
