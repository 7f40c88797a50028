"""From pods to replicas: where each one stands, read from the API server's documents alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mizzen.operator.controllers.llmdeployment_replicas import (
    MOST_GROUP_RESTARTS,
    Group,
    left_to_place_s,
    read_groups,
)
from mizzen.operator.planning.rollout import Standing as S

NOW = datetime(2026, 9, 1, 13, 0, 0, tzinfo=UTC)
Json = dict[str, Any]


def pod(
    rank: int = 0,
    *,
    nodes: int = 1,
    owner: str = "uid-1",
    leaving: bool = False,
    phase: str = "Running",
    gate: bool | None = None,
    ready: bool = False,
    loaded: bool = False,
    notes: dict[str, str] | None = None,
    containers: list[Json] | None = None,
    **labels: str,
) -> Json:
    conditions = [{"type": "Ready", "status": str(ready)}]
    if gate is not None:
        since = "2026-09-01T12:00:00Z"
        conditions.append(
            {"type": "mizzen.dev/in-service", "status": str(gate), "lastTransitionTime": since}
        )
    metadata: Json = {
        "name": f"x-r1-0-{rank}",
        "creationTimestamp": "2026-09-01T11:00:00Z",
        "labels": {
            "mizzen.dev/revision": "r1", "mizzen.dev/slot": "0", "mizzen.dev/rank": str(rank),
        } | {f"mizzen.dev/{key}": value for key, value in labels.items()},
        "annotations": {"mizzen.dev/group-size": str(nodes)} | (notes or {}),
        "ownerReferences": [{"uid": owner, "controller": True}],
    }  # fmt: skip
    if leaving:
        metadata["deletionTimestamp"] = "2026-09-01T12:59:00Z"
    containers = containers or [{"name": "runtime", "started": loaded or ready}]
    status = {"phase": phase, "conditions": conditions, "containerStatuses": containers}
    return {"metadata": metadata, "status": status}


DRAINING = {"mizzen.dev/draining-since": "2026-09-01T12:59:00Z"}
CASES: dict[str, tuple[list[Json], S]] = {
    "a new pod is starting": ([pod(phase="Pending")], S.STARTING),
    "a running pod that has not loaded is starting": ([pod()], S.STARTING),
    "a gate that opened at once makes no pod serve that has not loaded": (
        [pod(gate=True)], S.STARTING,
    ),
    "an open gate and a ready pod serve": ([pod(gate=True, ready=True)], S.IN_SERVICE),
    "a loaded pod that is not ready may have requests": ([pod(gate=True, loaded=True)], S.UNREADY),
    "a closed gate without a note may have requests": ([pod(gate=False, loaded=True)], S.UNREADY),
    "a noted drain drains": ([pod(gate=False, notes=DRAINING)], S.DRAINING),
    "a noted drain drains though the gate is still open": (
        [pod(gate=True, ready=True, notes=DRAINING)], S.DRAINING,
    ),
    "a deleted pod is leaving, drained or not": ([pod(leaving=True, notes=DRAINING)], S.LEAVING),
    "an ended pod has failed": ([pod(phase="Failed")], S.FAILED),
    "a pod that ended well has failed too: it should serve": ([pod(phase="Succeeded")], S.FAILED),
    "a group that is being made is starting": ([pod(0, nodes=2)], S.STARTING),
    "a group that lost a rank after it had served is lost": (
        [pod(0, nodes=2, gate=True, ready=True)], S.LOST,
    ),
    "a group without its leader is lost": ([pod(1, nodes=2)], S.LOST),
    "a group half of which is deleted is lost": (
        [pod(0, nodes=2, leaving=True), pod(1, nodes=2)], S.LOST,
    ),
    "a group that is wholly deleted is leaving": (
        [pod(0, nodes=2, leaving=True), pod(1, nodes=2, leaving=True)], S.LEAVING,
    ),
    "one ended rank fails its group": (
        [pod(0, nodes=2, gate=True, ready=True), pod(1, nodes=2, phase="Failed")], S.FAILED,
    ),
    "a group serves when its leader says so": (
        [pod(0, nodes=2, gate=True, ready=True), pod(1, nodes=2)], S.IN_SERVICE,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("pods", "standing"), CASES.values(), ids=CASES)
def test_where_a_replica_stands(pods: list[Json], standing: S) -> None:
    (group,) = read_groups(pods, owner_uid="uid-1", now=NOW)
    assert group.standing is standing


@pytest.mark.parametrize(
    "stranger",
    [pod(owner="uid-2"), pod(slot="x"), pod(revision=""), {**pod(), "metadata": {"name": "y"}}],
    ids=["another owner's", "with a strange slot", "without a revision", "without labels"],
)
def test_a_pod_that_is_not_ours_is_not_looked_at(stranger: Json) -> None:
    assert read_groups([stranger], owner_uid="uid-1", now=NOW) == []


@given(st.permutations([pod(0, nodes=2), pod(1, nodes=2), pod(0, slot="1"), pod(revision="r0")]))
def test_the_order_of_pods_does_not_matter(pods: list[Json]) -> None:
    groups = read_groups(pods, owner_uid="uid-1", now=NOW)
    places = [(group.replica.revision, group.replica.slot, len(group.pods)) for group in groups]
    assert places == [("r0", 0, 1), ("r1", 0, 2), ("r1", 1, 1)]


def test_the_missing_ranks_of_a_group_are_named() -> None:
    (group,) = read_groups([pod(0, nodes=4), pod(2, nodes=4)], owner_uid="uid-1", now=NOW)
    assert group.missing_ranks == (1, 3)


def ended(at: str) -> list[Json]:
    end = {"exitCode": 1, "startedAt": "2026-09-01T12:00:00Z", "finishedAt": at}
    return [{"name": "runtime", "state": {"terminated": end}}]


def test_failures_in_a_row_are_counted_on_the_pod_and_forgiven_after_ten_minutes() -> None:
    notes = {"mizzen.dev/restarts": "3"}
    early = pod(phase="Failed", notes=notes, containers=ended("2026-09-01T12:09:59Z"))
    late = pod(phase="Failed", notes=notes, containers=ended("2026-09-01T12:10:00Z"))
    never = pod(phase="Failed", notes=notes, containers=[{"name": "runtime", "state": {}}])
    counted = [
        read_groups([p], owner_uid="uid-1", now=NOW)[0].replica for p in (early, late, never)
    ]
    assert [replica.restarts for replica in counted] == [3, 0, 3]
    assert str(counted[0].failed_at) == "2026-09-01 12:09:59+00:00"


def test_a_group_that_failed_too_often_is_given_up_and_says_how_to_go_on() -> None:
    def group_after(restarts: int, nodes: int = 2) -> Group:
        notes = {"mizzen.dev/restarts": str(restarts)}
        last_words = {"reason": "RankLost", "message": "Pod 1 closed its connection."}
        end = {"exitCode": 76, "finishedAt": "2026-09-01T12:05:00Z"} | {
            "message": json.dumps(last_words)
        }
        dead = [{"name": "runtime", "state": {"terminated": end}}]
        ranks = [pod(rank, nodes=nodes, notes=notes, containers=dead) for rank in range(nodes)]
        ranks[0]["status"]["phase"] = "Failed"
        return read_groups(ranks, owner_uid="uid-1", now=NOW)[0]

    assert not group_after(MOST_GROUP_RESTARTS - 1).replica.is_given_up
    assert not group_after(MOST_GROUP_RESTARTS, nodes=1).replica.is_given_up
    last = group_after(MOST_GROUP_RESTARTS)
    assert last.replica.is_given_up
    assert last.cause is not None
    assert (last.cause.reason.value, last.cause.needs_change) == ("RankLost", True)
    assert last.cause.message.startswith("Pod 1 closed its connection. The group was restarted 6")
    assert "delete the failed pods" in last.cause.message


def test_what_a_rank_died_of_is_told_before_that_the_others_lost_it() -> None:
    lost = {"exitCode": 76, "message": json.dumps({"reason": "RankLost", "message": "Gone."})}
    killed = {"exitCode": 137, "reason": "OOMKilled"}
    pods = [
        pod(rank, nodes=2, phase="Failed", containers=[{"state": {"terminated": end}}])
        for rank, end in enumerate((lost, killed))
    ]
    (group,) = read_groups(pods, owner_uid="uid-1", now=NOW)
    assert group.cause is not None
    assert group.cause.reason.value == "OutOfMemory"


def test_half_a_group_that_finds_no_place_for_the_rest_gives_its_own_back_after_two_minutes() -> (
    None
):
    def seen(since: str, *, node: str = "n1") -> Group:
        placed, waiting = pod(0, nodes=2, phase="Pending"), pod(1, nodes=2, phase="Pending")
        placed["spec"] = {"nodeName": node} if node else {}
        waiting["status"]["conditions"] += [
            {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "lastTransitionTime": since,
            }
        ]
        return read_groups([placed, waiting], owner_uid="uid-1", now=NOW)[0]

    assert seen("2026-09-01T12:58:00Z").standing is S.LOST
    assert seen("2026-09-01T12:58:00Z", node="").standing is S.STARTING, "it holds nothing"
    young = seen("2026-09-01T12:58:30Z")
    assert young.standing is S.STARTING
    assert left_to_place_s(young, now=NOW) == 30


def test_a_successor_tells_its_predecessors_failure_until_it_serves_or_fails_itself() -> None:
    note = json.dumps({"reason": "RankLost", "message": "Rank 1 stayed silent."})
    notes = {"mizzen.dev/last-failure": note}
    (starting,) = read_groups([pod(notes=notes)], owner_uid="uid-1", now=NOW)
    assert starting.cause is not None
    assert (starting.cause.reason.value, starting.cause.needs_change) == ("RankLost", False)
    (serving,) = read_groups([pod(notes=notes, gate=True, ready=True)], owner_uid="uid-1", now=NOW)
    assert serving.cause is None
