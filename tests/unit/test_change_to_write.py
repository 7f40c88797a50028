"""The benchmark of changes to first writes: what its watches tell becomes times and a table."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from benchmarks.change_to_write import (
    CHANGES,
    DEPLOYMENTS,
    Fleet,
    change,
    deployment,
    is_as_wanted,
    row_of,
)

Json = dict[str, Any]


def resource(name: str = "m0", *, version: int = 10, generation: int = 2, **status: Any) -> Json:
    settled = {"replicas": 1, "readyReplicas": 1, "updatedReplicas": 1, "observedGeneration": 2}
    metadata = {"name": name, "generation": generation, "resourceVersion": str(version)}
    return deployment(name) | {"metadata": metadata, "status": settled | status}


def child(name: str, *, of: str = "m0", version: int = 5) -> Json:
    labels = {"mizzen.dev/deployment": of}
    return {"metadata": {"name": name, "labels": labels, "resourceVersion": str(version)}}


NOT_AS_WANTED = {
    "its newest spec was not looked at": (resource(generation=3), 1),
    "it has a pod too many": (resource(), 2),
    "a replica is not ready": (resource(readyReplicas=0), 1),
    "a replica is of an earlier revision": (resource(updatedReplicas=0), 1),
    "nobody has looked at it": (resource() | {"status": {}}, 1),
}


@pytest.mark.parametrize(("document", "pods"), NOT_AS_WANTED.values(), ids=NOT_AS_WANTED)
def test_a_deployment_is_not_settled_while(document: Json, pods: int) -> None:
    assert is_as_wanted(resource(), 1)
    assert not is_as_wanted(document, pods)


def test_the_fleet_is_settled_once_every_deployment_is() -> None:
    fleet = Fleet()
    for number in range(DEPLOYMENTS):
        assert not fleet.is_settled()
        fleet.see_resource("ADDED", resource(f"m{number}"))
        fleet.see_child("Pod", "ADDED", child("pod", of=f"m{number}"))
    assert fleet.is_settled()
    fleet.see_child("Pod", "DELETED", child("pod"))
    assert not fleet.is_settled()


class Api:
    """Takes a change, and tells of it and of what follows as the watches would."""

    def __init__(self, fleet: Fleet) -> None:
        self.http = self
        self._fleet = fleet

    async def request(self, method: str, path: str, **_: Any) -> Json:
        # The watches may be faster than the answer, and bring what is older than the change.
        self._fleet.see_child("Pod", "MODIFIED", child("pod", version=10))
        changed = resource(version=11, generation=3)
        self._fleet.see_resource("MODIFIED", changed)
        asyncio.get_running_loop().call_later(0.05, self._write)
        return changed

    def _write(self) -> None:
        self._fleet.see_child("PodDisruptionBudget", "ADDED", child("m0", version=12))
        self._fleet.see_child("Pod", "ADDED", child("pod-1", version=13))


async def test_the_first_write_is_the_first_event_that_is_newer_than_the_change() -> None:
    fleet = Fleet()
    fleet.see_resource("ADDED", resource(version=9))
    after_ms, what = await change(Api(fleet), fleet, "size", "m0")  # type: ignore[arg-type]
    assert what == "PodDisruptionBudget"
    assert after_ms > 0


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_made_twice_brings_back_the_spec_as_it_was(kind: str) -> None:
    spec = deployment("m0")["spec"]
    once = merged(spec, CHANGES[kind](spec))
    assert once != spec
    assert merged(once, CHANGES[kind](once)) == spec


def merged(spec: Json, patch: Json) -> Json:
    return spec | {
        name: spec[name] | value if isinstance(value, dict) else value
        for name, value in patch.items()
    }


def test_a_row_says_how_long_it_took_and_what_was_written_first() -> None:
    row = row_of("size", [(float(ms), "Pod" if ms > 1 else "status") for ms in range(1, 101)])
    assert (row["times"], row["p50_ms"], row["p99_ms"], row["longest_ms"]) == (100, 50, 99, 100)
    assert row["first_write"] == "Pod 99, status 1"
