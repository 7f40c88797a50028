"""The store: the newest version wins, relists cure missed events, nothing is left behind."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mizzen.operator.engine.key import Key
from mizzen.operator.kube.documents import Ref
from mizzen.operator.kube.store import Store
from mizzen.operator.kube.trim import trim
from mizzen.operator.routing import INDEXES, PROMOTES_TO, neighbours, route

Json = dict[str, Any]
OWNER = Key("llmdeployment", "default", "smollm2")


def pod(name: str, version: int, *, owner: str = "smollm2", phase: str = "Running") -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": f"uid-{name}",
            "resourceVersion": str(version),
            "labels": {"mizzen.dev/deployment": owner},
        },
        "status": {"phase": phase},
    }


def job(name: str, version: int, target: str | None) -> Json:
    promotion = {"promotion": {"deployment": target}} if target else {}
    return {
        "apiVersion": "mizzen.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": "default", "resourceVersion": str(version)},
        "spec": {"baseModel": {"deployment": "base"}, **promotion},
    }


def deployment(name: str, version: int) -> Json:
    return {
        "apiVersion": "mizzen.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": name, "namespace": "default", "resourceVersion": str(version)},
        "spec": {},
    }


@pytest.fixture
def store() -> Store:
    return Store(route, indexes=INDEXES)


def phases(store: Store) -> dict[str, str]:
    return {
        child["metadata"]["name"]: child["status"]["phase"]
        for child in store.children(OWNER, "Pod")
    }


def test_a_new_object_concerns_its_owner(store: Store) -> None:
    assert store.put(pod("a", 1)) == {OWNER}


def test_the_same_version_again_is_no_news(store: Store) -> None:
    store.put(pod("a", 1))
    assert store.put(pod("a", 1)) == set()


def test_an_older_version_changes_nothing(store: Store) -> None:
    store.put(pod("a", 5, phase="Running"))
    assert store.put(pod("a", 4, phase="Pending")) == set()
    assert phases(store) == {"a": "Running"}


def test_versions_are_compared_as_numbers(store: Store) -> None:
    store.put(pod("a", 9, phase="Pending"))
    store.put(pod("a", 10, phase="Running"))
    assert phases(store) == {"a": "Running"}


def test_a_new_version_that_says_the_same_is_no_news(store: Store) -> None:
    store.put(pod("a", 1))
    again = pod("a", 2)
    again["metadata"]["managedFields"] = [{"manager": "somebody"}]
    assert store.put(again) == set()
    assert store.get(Ref.of(again))["metadata"]["resourceVersion"] == "2"  # type: ignore[index]


def test_a_changed_owner_concerns_both(store: Store) -> None:
    store.put(pod("a", 1))
    other = Key("llmdeployment", "default", "other")
    assert store.put(pod("a", 2, owner="other")) == {OWNER, other}
    assert store.children(OWNER, "Pod") == []
    assert len(store.children(other, "Pod")) == 1


def test_a_late_event_does_not_bring_a_deleted_object_back(store: Store) -> None:
    store.put(pod("a", 1))
    assert store.remove(pod("a", 5)) == {OWNER}
    assert store.put(pod("a", 3)) == set()
    assert phases(store) == {}


def test_an_object_made_anew_under_its_old_name_is_seen(store: Store) -> None:
    store.remove(pod("a", 5))
    assert store.put(pod("a", 6)) == {OWNER}


def test_a_late_deletion_does_not_remove_what_was_made_anew(store: Store) -> None:
    store.put(pod("a", 6))
    assert store.remove(pod("a", 5)) == set()
    assert phases(store) == {"a": "Running"}


def test_a_relist_removes_what_was_deleted_unseen(store: Store) -> None:
    store.put(pod("a", 1))
    store.put(pod("b", 2))
    assert store.prune("Pod", {Ref.of(pod("a", 1))}, version=10) == {OWNER}
    assert phases(store) == {"a": "Running"}


def test_a_relist_spares_what_is_newer_than_it(store: Store) -> None:
    store.put(pod("a", 12))
    assert store.prune("Pod", set(), version=10) == set()
    assert phases(store) == {"a": "Running"}


def test_a_relist_of_one_namespace_spares_the_others(store: Store) -> None:
    store.put(pod("a", 1))
    assert store.prune("Pod", set(), version=10, namespace="other") == set()
    assert phases(store) == {"a": "Running"}


def test_children_come_sorted_by_name(store: Store) -> None:
    for name in "cab":
        store.put(pod(name, 1))
    assert list(phases(store)) == ["a", "b", "c"]


def test_a_job_concerns_the_deployment_it_promotes_to(store: Store) -> None:
    keys = store.put(job("support", 1, "smollm2"))
    assert keys == {Key("finetunejob", "default", "support"), OWNER}
    found = store.lookup("FineTuneJob", PROMOTES_TO, "default", "smollm2")
    assert [item["metadata"]["name"] for item in found] == ["support"]


def test_a_promotion_to_nowhere_concerns_nobody_else(store: Store) -> None:
    document = job("support", 1, "smollm2")
    document["spec"]["promotion"]["strategy"] = "None"
    assert store.put(document) == {Key("finetunejob", "default", "support")}


def test_jobs_look_again_when_the_deployment_they_need_changes(store: Store) -> None:
    store.put(job("support", 1, "smollm2"))
    store.put(job("other", 2, None))
    expected = {"smollm2": {"support"}, "base": {"support", "other"}, "third": set()}
    for name, jobs in expected.items():
        keys = set(neighbours(deployment(name, 3), store))
        assert {key.name for key in keys} == jobs


def test_kinds_nobody_watches_are_forgotten_at_a_relist(store: Store) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "d"}}
    store.put(secret | {"metadata": {**secret["metadata"], "resourceVersion": "1"}})  # type: ignore[dict-item]
    store.put(pod("a", 1))
    store.drop_except({"Pod"})
    assert store.all("Secret") == []
    assert len(store.all("Pod")) == 1


EVENTS = st.permutations(
    [
        ("put", pod("a", 1, phase="Pending")),
        ("put", pod("a", 2, phase="Running")),
        ("remove", pod("a", 3)),
        ("put", pod("a", 4, phase="Pending")),
        ("put", pod("a", 5, phase="Failed")),
        ("put", pod("b", 6, owner="other")),
        ("remove", pod("b", 7, owner="other")),
    ]
)


@given(events=EVENTS)
def test_the_order_of_events_does_not_matter(events: list[tuple[str, Json]]) -> None:
    store = Store(route, indexes=INDEXES)
    for action, document in events:
        store.put(document) if action == "put" else store.remove(document)
    assert phases(store) == {"a": "Failed"}
    assert len(store) == 1


@given(events=EVENTS)
def test_deleted_objects_leave_no_trace(events: list[tuple[str, Json]]) -> None:
    store = Store(route, indexes=INDEXES)
    for action, document in events:
        store.put(document) if action == "put" else store.remove(document)
    store.prune("Pod", set(), version=100)
    store.prune("Pod", set(), version=101)
    held = {
        name: value
        for name, value in vars(store).items()
        if isinstance(value, dict) and name not in ("_indexes", "_by_kind")
    }
    assert held
    assert not any(held.values())


def test_a_stored_pod_keeps_what_decisions_need_and_no_more() -> None:
    whole = pod("a", 1)
    whole["metadata"]["managedFields"] = [{"manager": "kubelet"}]
    whole["spec"] = {"nodeName": "node0", "containers": [{"name": "runtime", "env": []}]}
    whole["status"] |= {"podIP": "10.0.0.1", "hostIPs": [{"ip": "1.2.3.4"}]}
    kept = trim(whole)
    assert kept["spec"] == {"nodeName": "node0"}
    assert kept["status"] == {"phase": "Running", "podIP": "10.0.0.1"}
    assert "managedFields" not in kept["metadata"]
    assert "managedFields" in whole["metadata"]
