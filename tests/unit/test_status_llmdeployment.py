"""A deployment's status: what people, kubectl wait and Helm read from it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mizzen.operator.crds.llmdeployment_status import LLMDeploymentStatus
from mizzen.operator.planning.rollout import Standing as S
from mizzen.operator.status.causes import Cause
from mizzen.operator.status.llmdeployment import (
    AdapterSeen,
    PodSeen,
    ReplicaSeen,
    Seen,
    news,
    next_status,
)
from mizzen.operator.status.reasons import Reason
from mizzen.operator.status.scaling import scaling_seen

NOW = datetime(2026, 9, 1, 12, 0, 0, tzinfo=UTC)
BAD = Cause(Reason.NOT_A_MODEL, "No config.json.")
FULL = Cause(Reason.UNSCHEDULABLE, "No node has room.", needs_change=False)


def replica(standing: S, revision: str = "new", slot: int = 0, **more: Any) -> ReplicaSeen:
    pods = (PodSeen(f"x-{revision}-{slot}-0", "node-1"),)
    return ReplicaSeen(revision, standing, pods, **more)


def seen(*replicas: ReplicaSeen, desired: int = 1, **more: Any) -> Seen:
    facts: dict[str, Any] = {
        "generation": 3, "revision": "new", "desired": desired, "max_unavailable": 0,
        "scaling": None, "url": "http://x.team.svc:8000/v1", "selector": "a=b",
        "devices_per_pod": 2, "replicas": replicas,
    }  # fmt: skip
    return Seen(**(facts | more))


def words(status: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}


CASES: dict[str, tuple[Seen, str, dict[str, tuple[str, str]]]] = {
    "just created": (
        seen(replica(S.STARTING)), "Starting",
        {"Ready": ("False", "Starting"), "Available": ("False", "Starting"),
         "Progressing": ("True", "Starting"), "Reconciling": ("True", "Starting"),
         "Degraded": ("False", "AsExpected"), "Accepted": ("True", "Valid")},
    ),
    "everything serves": (
        seen(replica(S.IN_SERVICE)), "Ready",
        {"Ready": ("True", "InService"), "Available": ("True", "InService"),
         "Progressing": ("False", "Settled"), "AdaptersReady": ("True", "NoAdapters"),
         "ScalingActive": ("False", "ScalingDisabled")},
    ),
    "a rollout keeps the old revision serving": (
        seen(replica(S.IN_SERVICE, "old"), replica(S.STARTING)), "Updating",
        {"Ready": ("False", "RollingOut"), "Available": ("True", "InService"),
         "Reconciling": ("True", "RollingOut"), "Degraded": ("False", "AsExpected")},
    ),
    "the new revision serves, the old one drains": (
        seen(replica(S.DRAINING, "old"), replica(S.IN_SERVICE)), "Ready",
        {"Ready": ("True", "InService"), "Reconciling": ("True", "Draining")},
    ),
    "what was deleted and only ends is no work of ours": (
        seen(replica(S.LEAVING, "old"), replica(S.IN_SERVICE)), "Ready",
        {"Ready": ("True", "InService"), "Progressing": ("False", "Settled")},
    ),
    "a bad model with nothing serving": (
        seen(replica(S.STARTING, cause=BAD)), "Failed",
        {"Ready": ("False", "NotAModel"), "Available": ("False", "NotAModel"),
         "Degraded": ("True", "NotAModel"), "Stalled": ("True", "NotAModel"),
         "Progressing": ("False", "NotAModel")},
    ),
    "a bad model while the old revision serves": (
        seen(replica(S.IN_SERVICE, "old"), replica(S.STARTING, cause=BAD)), "Degraded",
        {"Ready": ("False", "NotAModel"), "Available": ("True", "InService"),
         "Stalled": ("True", "NotAModel")},
    ),
    "no room, which may pass": (
        seen(replica(S.STARTING, cause=FULL)), "Pending",
        {"Ready": ("False", "Unschedulable"), "Reconciling": ("True", "Starting")},
    ),
    "trouble of an old replica is not this spec's": (
        seen(replica(S.UNREADY, "old", cause=BAD), replica(S.STARTING)), "Updating",
        {"Ready": ("False", "RollingOut"), "Degraded": ("False", "AsExpected")},
    ),
    "one replica short": (
        seen(replica(S.IN_SERVICE), replica(S.STARTING, slot=1), desired=2), "Starting",
        {"Ready": ("False", "Starting"), "Available": ("False", "Starting")},
    ),
    "one replica short where one may be missing": (
        seen(replica(S.IN_SERVICE), replica(S.STARTING, slot=1), desired=2, max_unavailable=1),
        "Starting", {"Ready": ("False", "Starting"), "Available": ("True", "InService")},
    ),
    "nothing wanted and nothing there": (
        seen(desired=0), "Stopped",
        {"Ready": ("True", "ScaledToZero"), "Available": ("False", "ScaledToZero")},
    ),
    "gates that are closed to see whether anybody asks": (
        seen(replica(S.UNREADY), is_holding=True), "Stopping",
        {"Ready": ("True", "ScaledToZero"), "Available": ("False", "ScaledToZero"),
         "Progressing": ("False", "Settled"), "Degraded": ("False", "AsExpected")},
    ),
    "not looked at by the autoscaler yet": (
        seen(replica(S.IN_SERVICE), scaling=scaling_seen({})), "Ready",
        {"ScalingActive": ("Unknown", "NotYetDecided"), "Ready": ("True", "InService")},
    ),
    "load that is not known": (
        seen(
            replica(S.IN_SERVICE),
            scaling=scaling_seen({"scaling": {"state": "SignalsUnknown", "message": "No data."}}),
        ),
        "Ready",
        {"ScalingActive": ("False", "SignalsUnknown"), "Ready": ("True", "InService")},
    ),
    "a spec that cannot be followed": (
        seen(refusal=Cause(Reason.INVALID_SPEC, "spec.replicas: not a number")), "Failed",
        {"Ready": ("False", "InvalidSpec"), "Accepted": ("False", "InvalidSpec"),
         "Stalled": ("True", "InvalidSpec")},
    ),
    "an adapter on its way": (
        seen(replica(S.IN_SERVICE), adapters=(AdapterSeen("a"),)), "Ready",
        {"AdaptersReady": ("False", "LoadingAdapters"), "Ready": ("True", "InService")},
    ),
    "an adapter everywhere": (
        seen(replica(S.IN_SERVICE, adapters=("a",)), adapters=(AdapterSeen("a"),)), "Ready",
        {"AdaptersReady": ("True", "AdaptersLoaded")},
    ),
    "an adapter that is refused": (
        seen(replica(S.IN_SERVICE), adapters=(AdapterSeen("a", error="Its rank is 128."),)),
        "Ready", {"AdaptersReady": ("False", "AdapterRefused"),
                  "Degraded": ("True", "AdapterRefused"), "Ready": ("True", "InService")},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "phase", "expected"), CASES.values(), ids=CASES)
def test_the_status_says(facts: Seen, phase: str, expected: dict[str, tuple[str, str]]) -> None:
    status = next_status({}, facts, now=NOW)
    found = words(status)
    assert status["phase"] == phase
    assert {type_: found.get(type_) for type_ in expected} == expected


standings = st.sampled_from(list(S))
replicas = st.lists(
    st.builds(
        replica,
        standings,
        st.sampled_from(["old", "new"]),
        slot=st.integers(0, 3),
        cause=st.sampled_from([None, BAD, FULL]),
    ),
    max_size=4,
    unique_by=lambda one: one.pods,
)
situations = st.builds(
    lambda some, **more: seen(*some, **more),
    replicas,
    desired=st.integers(0, 3),
    refusal=st.sampled_from([None, Cause(Reason.INVALID_SPEC, "No.")]),
)


def kstatus(status: dict[str, Any]) -> str:
    """Return what Helm --wait and other readers of kstatus make of it (cli-utils, kstatus)."""
    found = words(status)
    if status["observedGeneration"] != 3:
        return "InProgress"
    if found.get("Stalled", ("",))[0] == "True":
        return "Failed"
    if found.get("Reconciling", ("",))[0] == "True":
        return "InProgress"
    return "Current" if found["Ready"][0] == "True" else "InProgress"


@given(situations)
def test_it_is_current_exactly_when_all_that_is_wanted_serves_and_nothing_is_left_over(
    facts: Seen,
) -> None:
    status = next_status({}, facts, now=NOW)
    assert (kstatus(status) == "Current") == facts.is_settled
    found = words(status)
    assert not {"Stalled", "Reconciling"} <= found.keys()


@given(situations)
def test_looking_again_later_changes_nothing(facts: Seen) -> None:
    first = next_status({}, facts, now=NOW)
    assert next_status(first, facts, now=NOW + timedelta(hours=1)) == first
    assert news(first, first) == []


@given(situations)
def test_the_crd_has_a_place_for_every_field(facts: Seen) -> None:
    status = next_status({}, facts, now=NOW)
    parsed = LLMDeploymentStatus.parse(status).to_api()
    assert parsed == status
    assert all(condition["message"] for condition in status["conditions"])


@given(situations)
def test_messages_hold_no_pod_names(facts: Seen) -> None:
    status = next_status({}, facts, now=NOW)
    names = {pod.name for one in facts.replicas for pod in one.pods}
    text = " ".join(condition["message"] for condition in status["conditions"])
    assert not any(name in text for name in names)


def test_one_cause_is_told_once_though_it_flips_two_conditions() -> None:
    before = next_status({}, seen(replica(S.IN_SERVICE)), now=NOW)
    after = next_status(before, seen(replica(S.UNREADY, cause=BAD)), now=NOW)
    told = [(flip.type.value, flip.reason, flip.is_warning) for flip in news(before, after)]
    assert told == [("Ready", "NotAModel", True)]
    back = next_status(after, seen(replica(S.IN_SERVICE)), now=NOW)
    told = [(flip.type.value, flip.reason, flip.is_warning) for flip in news(after, back)]
    assert told == [("Ready", "InService", False)]


def test_a_start_that_went_as_it_should_is_no_news_but_one_after_a_fault_is() -> None:
    ready = seen(replica(S.IN_SERVICE))
    for before, told in (
        (seen(replica(S.STARTING)), []),
        (seen(replica(S.STARTING, cause=BAD)), ["InService"]),
    ):
        first = next_status({}, before, now=NOW)
        assert [flip.reason for flip in news(first, next_status(first, ready, now=NOW))] == told


def test_a_planned_rollout_is_no_warning() -> None:
    before = next_status({}, seen(replica(S.IN_SERVICE, "old")), now=NOW)
    ready = next_status(before, seen(replica(S.IN_SERVICE)), now=NOW)
    rolling = seen(replica(S.IN_SERVICE), replica(S.STARTING, "newer"), revision="newer")
    after = next_status(ready, rolling, now=NOW)
    told = [(flip.reason, flip.is_warning) for flip in news(ready, after)]
    assert told == [("RollingOut", False)]


def test_the_node_of_a_pod_is_told_once_it_serves() -> None:
    starting = next_status({}, seen(replica(S.STARTING)), now=NOW)
    assert starting["pods"] == [{"name": "x-new-0-0", "state": "Starting"}]
    serving = next_status({}, seen(replica(S.IN_SERVICE)), now=NOW)
    assert serving["pods"] == [{"name": "x-new-0-0", "state": "Ready", "node": "node-1"}]


def test_counts_are_those_of_kubectl_scale() -> None:
    facts = seen(
        replica(S.IN_SERVICE), replica(S.STARTING, slot=1), replica(S.IN_SERVICE, "old"),
        replica(S.LEAVING, "old", slot=1), desired=2,
    )  # fmt: skip
    status = next_status({}, facts, now=NOW)
    counts = ("ready", "replicas", "readyReplicas", "updatedReplicas", "gpus")
    assert [status[name] for name in counts] == ["2/2", 3, 2, 2, 8]
