"""What benchmarks read of pods: the streams of one that leaves, and what the system's use."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from benchmarks import leaving_pods
from benchmarks.deployment import Deployment
from benchmarks.leaving_pods import LeavingPods, streams_in
from benchmarks.pod_usage import Snapshot, Usage, snapshots
from hack.ports import free_port

Json = dict[str, Any]


def pod(uid: str, *, is_open: bool, deployment: str = "chat", **metadata: str) -> Json:
    gate = {"type": "mizzen.dev/in-service", "status": str(is_open)}
    return {
        "metadata": {"uid": uid, "labels": {"mizzen.dev/deployment": deployment}, **metadata},
        "status": {"podIP": uid, "conditions": [gate]},
    }


def test_requests_that_run_and_that_wait_are_streams() -> None:
    metrics = (
        "# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{model_name="a"} 2.0\n'
        'vllm:num_requests_waiting{model_name="a"} 1.0\n'
        'vllm:num_requests_waiting_by_reason{model_name="a"} 7.0\n'
    )
    assert streams_in(metrics) == 3


async def test_a_pod_is_asked_once_when_it_leaves_service_or_is_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    async def ask(self: LeavingPods, address: str) -> None:
        asked.append(address)

    monkeypatch.setattr(LeavingPods, "_ask", ask)
    leaving = LeavingPods(["chat"])
    leaving.see("ADDED", pod("new", is_open=False))  # never served, so it does not leave
    for uid in ("drained", "deleted"):
        leaving.see("ADDED", pod(uid, is_open=True))
    leaving.see("ADDED", pod("other", is_open=True, deployment="other"))
    leaving.see("MODIFIED", pod("other", is_open=False, deployment="other"))
    leaving.see("MODIFIED", pod("drained", is_open=False))
    leaving.see("MODIFIED", pod("deleted", is_open=True, deletionTimestamp="now"))
    leaving.see("DELETED", pod("deleted", is_open=False, deletionTimestamp="now"))
    await asyncio.sleep(0)  # the tasks begin
    assert asked == ["drained", "deleted"]


async def test_a_pod_that_does_not_answer_counts_as_without_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leaving_pods, "ADMIN_PORT", free_port())
    leaving = LeavingPods(["chat"])
    leaving.see("ADDED", pod("127.0.0.1", is_open=True))
    leaving.see("MODIFIED", pod("127.0.0.1", is_open=False))
    while not leaving.streams:  # noqa: ASYNC110 - it has no event to wait for
        await asyncio.sleep(0.01)
    assert leaving.streams == [0]


def test_usage_is_of_the_charts_pods_between_two_moments() -> None:
    def summary(namespace: str, cpu_ns: int, rss: int) -> Json:
        return {
            "podRef": {"namespace": namespace, "name": "operator-1"},
            "cpu": {"usageCoreNanoSeconds": cpu_ns},
            "memory": {"rssBytes": rss},
        }

    mine = summary("mizzen-system", 3_000_000_000, 50 << 20)
    found = dict(snapshots({"pods": [mine, summary("quickstart", 9, 9)]}))
    assert found == {"operator-1": Snapshot(3.0, 50.0)}
    used = Usage.between("operator-1", found["operator-1"], Snapshot(8.0, 60.0), 10.0)
    assert used == Usage("operator-1", 5.0, 0.5, 50, 60)


async def test_a_successor_of_the_same_name_does_not_keep_a_pod_from_having_left() -> None:
    class Played(Deployment):
        """Of two replicas, of which the first had its name from one that was drained."""

        async def pods(self) -> list[Json]:
            return [{"metadata": {"name": f"chat-{n}", "uid": f"new-{n}"}} for n in range(2)]

        async def settle(self, replicas: int) -> None:
            assert replicas == 2

    async with asyncio.timeout(30):
        await Played("chat", "team").replaced({"old-0"})
