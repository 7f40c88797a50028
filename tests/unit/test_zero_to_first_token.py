"""The benchmark of starts from zero: what it is told becomes steps, and sizes come back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from benchmarks.rows import as_table
from benchmarks.zero_to_first_token import (
    SIZE,
    STEPS,
    Start,
    first_token,
    in_order,
    percentiles,
    size_change,
    steps_of,
)

Json = dict[str, Any]


def pod(*conditions: str, is_running: bool = False, **metadata: Any) -> Json:
    return {
        "metadata": {"labels": {"mizzen.dev/deployment": "chat"}} | metadata,
        "status": {
            "conditions": [{"type": one, "status": "True"} for one in conditions],
            "containerStatuses": [{"state": {"running" if is_running else "waiting": {}}}],
        },
    }


PODS = {
    "a pod that waits for a node is created": (pod(), 1),
    "one with a node is scheduled": (pod("PodScheduled"), 2),
    "one whose process runs is started": (pod("PodScheduled", is_running=True), 3),
    "one that would answer has loaded": (
        pod("PodScheduled", "ContainersReady", is_running=True),
        4,
    ),
    "one that the operator let in is in service": (
        pod("PodScheduled", "ContainersReady", "Ready", is_running=True),
        5,
    ),
}


@pytest.mark.parametrize(("document", "count"), PODS.values(), ids=PODS)
def test_how_far_a_pod_is(document: Json, count: int) -> None:
    assert steps_of(document) == list(STEPS[1:6][:count])


def model(name: str = "chat", wake: str = "") -> Json:
    return {"metadata": {"name": name, "annotations": {"mizzen.dev/wake": wake} if wake else {}}}


def test_a_wake_counts_when_it_is_another_than_the_one_before_the_request() -> None:
    start = Start("chat")
    start.see_deployment("LISTED", model(wake="10:00;held=1"))
    start.begin()
    start.see_deployment("MODIFIED", model("other", wake="10:05;held=1"))
    start.see_deployment("MODIFIED", model(wake="10:00;held=1"))
    assert start.steps_s == {}
    start.see_deployment("MODIFIED", model(wake="10:05;held=1"))
    assert list(start.steps_s) == ["woken"]


def test_pods_that_leave_or_are_anothers_are_no_step() -> None:
    start = Start("chat")
    start.begin()
    start.see_pod("MODIFIED", pod("Ready", deletionTimestamp="2026-09-01T10:00:00Z"))
    start.see_pod("DELETED", pod("Ready"))
    start.see_pod("ADDED", pod("Ready", labels={"mizzen.dev/deployment": "other"}))
    assert start.steps_s == {}
    start.see_pod("ADDED", pod())
    assert list(start.steps_s) == ["pod_created"]


@asynccontextmanager
async def gateway(*lines: str, status: int = 200) -> AsyncIterator[tuple[str, list[Json]]]:
    asked: list[Json] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append(json.loads(await request.read()))
        return web.Response(status=status, text="".join(f"{line}\n\n" for line in lines))

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


def event(**delta: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": delta}]})


async def test_the_first_text_is_the_first_token_and_what_comes_before_is_not() -> None:
    start = Start("chat")
    waiting = ": waiting for a replica"
    lines = waiting, event(role="assistant"), event(content="Paris"), "data: [DONE]"
    async with gateway(*lines) as (url, asked):
        await first_token(url, "chat", start)
    assert list(start.steps_s) == ["first_token"]
    assert asked[0]["model"] == "chat" and asked[0]["stream"]


async def test_a_request_that_is_refused_or_breaks_off_ends_the_run() -> None:
    async with gateway("no key", status=401) as (url, _):
        with pytest.raises(RuntimeError, match="refused: 401 no key"):
            await first_token(url, "chat", Start("chat"))
    async with gateway(event(content="Par")) as (url, _):
        with pytest.raises(RuntimeError, match="the stream ended with"):
            await first_token(url, "chat", Start("chat"))
    async with gateway(event(role="assistant"), "data: [DONE]") as (url, _):
        with pytest.raises(RuntimeError, match="the stream ended with"):
            await first_token(url, "chat", Start("chat"))


SPECS: dict[str, Json] = {
    "of fixed size": {"replicas": 2},
    "scaled": {"scaling": {"min": 1, "max": 4}},
    "of one replica by default": {},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_deployment_gets_its_own_size_back(spec: Json) -> None:
    own = {"model": {"source": "pvc://m"}} | spec
    resized = patched(own, size_change(own, SIZE))
    assert resized == {"model": own["model"]} | SIZE
    assert patched(resized, size_change(resized, own)) == own


def patched(spec: Json, changes: list[Json]) -> Json:
    result = dict(spec)
    for change in changes:
        name = change["path"].removeprefix("/spec/")
        if change["op"] == "remove":
            del result[name]
        else:
            result[name] = change["value"]
    return result


def test_the_table_has_a_column_for_each_step_and_leaves_out_what_nobody_told_of() -> None:
    starts = [
        Start("chat", steps_s={"woken": 0.1, "first_token": 5.0}),
        Start("chat", steps_s={"first_token": 7.0}),
    ]
    rows = percentiles(starts)
    assert [row["first_token_s"] for row in rows] == [5.0, 7.0, 7.0]
    assert [row["woken_s"] for row in rows] == [0.1, 0.1, 0.1]
    table = as_table([{"start": 1, **in_order(starts[1].steps_s)}, *rows]).splitlines()
    assert table[0].split() == ["start", *(f"{step}_s" for step in STEPS)]
    assert table[1].split() == ["1", "7.0"]
