"""Model names to replicas: what is known, from which objects, and which replica is next."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mizzen.runtime.gateway.balancer import Balancer
from mizzen.runtime.gateway.directory import (
    Directory,
    Endpoint,
    EndpointState,
    ObjectKey,
    ServedModel,
)
from mizzen.runtime.gateway.sinks import ModelSink, SliceSink, parse_model, parse_slice
from tests.fixtures.clock import Clock

OLD = ServedModel("team", "tiny", "tiny", created_at_s=1, adapters=("support",))
NEW = ServedModel("other", "small", "tiny", created_at_s=2)
NAMED = ServedModel("team", "q", "Qwen/Qwen3-8B", created_at_s=3)

NAMES: dict[str, tuple[str, tuple[ObjectKey, str] | None]] = {
    "a served name": ("tiny", (OLD.key, "tiny")),
    "an adapter": ("tiny:support", (OLD.key, "tiny:support")),
    "an adapter that status does not know yet": ("tiny:new", (OLD.key, "tiny:new")),
    "the older of two with one name": ("tiny", (OLD.key, "tiny")),
    "the younger by its namespace": ("other/tiny", (NEW.key, "tiny")),
    "the younger by its resource": ("other/small", (NEW.key, "tiny")),
    "an adapter in a namespace": ("other/tiny:x", (NEW.key, "tiny:x")),
    "a name with a slash": ("Qwen/Qwen3-8B", (NAMED.key, "Qwen/Qwen3-8B")),
    "a name with a slash in a namespace": ("team/Qwen/Qwen3-8B", (NAMED.key, "Qwen/Qwen3-8B")),
    "a resource's name that is not its served name": ("q", None),
    "nothing": ("", None),
    "an adapter of nothing": (":support", None),
    "a model with an empty adapter": ("tiny:", None),
    "another namespace": ("nowhere/tiny", None),
}


@pytest.mark.parametrize(("name", "expected"), NAMES.values(), ids=NAMES)
def test_a_name_leads_to(name: str, expected: tuple[ObjectKey, str] | None) -> None:
    directory = Directory()
    for model in (NAMED, NEW, OLD):
        directory.put_model(model)
    route = directory.resolve(name)
    assert (route and (route.model.key, route.upstream_name)) == expected


def test_each_model_is_listed_once_under_the_plainest_name_that_is_its_own() -> None:
    directory = Directory()
    directory.replace_models([NAMED, NEW, OLD], namespace=None)
    assert directory.names() == ["Qwen/Qwen3-8B", "other/tiny", "tiny", "tiny:support"]


def test_a_name_passes_on_when_its_owner_is_gone() -> None:
    directory = Directory()
    directory.replace_models([NEW, OLD], namespace=None)
    directory.drop_model(OLD.key)
    route = directory.resolve("tiny")
    assert route is not None
    assert route.model == NEW


def test_a_list_of_one_namespace_leaves_the_others_alone() -> None:
    directory = Directory()
    directory.replace_models([OLD, NEW], namespace=None)
    directory.put_slice(("other", "s"), deployment=NEW.key, endpoints=(Endpoint("http://n"),))
    directory.put_slice(("team", "s"), deployment=OLD.key, endpoints=(Endpoint("http://o"),))
    directory.replace_models([], namespace="team")
    directory.replace_slices({}, namespace="team")
    assert [model for _, model in directory.models()] == [NEW]
    assert directory.ready_count(NEW.key) == 1
    assert directory.ready_count(OLD.key) == 0


def _slice(name: str, endpoints: object, **more: object) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "team",
            "labels": {"mizzen.dev/deployment": "tiny"},
        },
        "ports": [{"name": "grpc", "port": 8001}, {"name": "http", "port": 8000}],
        "endpoints": endpoints,
        **more,
    }


def _endpoint(address: str, **conditions: bool) -> dict[str, Any]:
    return {"addresses": [address], "conditions": conditions}


CONDITIONS: dict[str, tuple[dict[str, bool], EndpointState | None]] = {
    "ready": ({"ready": True, "serving": True, "terminating": False}, EndpointState.READY),
    "nothing said, which means ready": ({}, EndpointState.READY),
    "gated": ({"ready": False, "serving": False, "terminating": False}, None),
    "going away and still answering": (
        {"ready": False, "serving": True, "terminating": True},
        EndpointState.TERMINATING,
    ),
    "going away": ({"ready": False, "serving": False, "terminating": True}, None),
}


@pytest.mark.parametrize(("conditions", "state"), CONDITIONS.values(), ids=CONDITIONS)
def test_an_endpoint_is_taken_for(conditions: dict[str, bool], state: EndpointState | None) -> None:
    deployment, endpoints = parse_slice(_slice("s", [_endpoint("10.0.0.1", **conditions)]))
    assert deployment == ("team", "tiny")
    expected = () if state is None else (Endpoint("http://10.0.0.1:8000", state),)
    assert endpoints == expected


def test_strange_slices_are_read_as_far_as_they_go() -> None:
    assert parse_slice(_slice("s", None, ports=None))[1] == ()
    assert parse_slice(_slice("s", [{"addresses": None}, {}]))[1] == ()
    _, endpoints = parse_slice(_slice("s", [_endpoint("fd00::1")], ports=[{"port": None}]))
    assert endpoints == (Endpoint("http://[fd00::1]:8000"),)


def test_replicas_that_are_going_away_are_asked_only_when_nothing_is_ready() -> None:
    directory = Directory()
    sink = SliceSink(directory)
    leaving = _endpoint("10.0.0.1", ready=False, serving=True, terminating=True)
    sink.put(_slice("s", [leaving, _endpoint("10.0.0.2")]))
    assert [e.url for e in directory.endpoints(OLD.key)] == ["http://10.0.0.2:8000"]
    sink.put(_slice("s", [leaving]))
    assert [e.url for e in directory.endpoints(OLD.key)] == ["http://10.0.0.1:8000"]
    assert directory.ready_count(OLD.key) == 0


def test_an_address_in_two_slices_is_one_replica() -> None:
    directory = Directory()
    gone: list[str] = []
    directory.on_endpoint_gone = gone.append
    sink = SliceSink(directory)
    sink.put(_slice("a", [_endpoint("10.0.0.1", ready=False, serving=True, terminating=True)]))
    sink.put(_slice("b", [_endpoint("10.0.0.1")]))
    assert directory.endpoints(OLD.key) == (Endpoint("http://10.0.0.1:8000"),)
    sink.drop(_slice("a", []))
    assert directory.ready_count(OLD.key) == 1
    assert gone == []
    sink.drop(_slice("b", []))
    assert gone == ["http://10.0.0.1:8000"]


def test_a_list_forgets_what_is_no_longer_there() -> None:
    directory = Directory()
    sink = SliceSink(directory)
    sink.replace([_slice("a", [_endpoint("10.0.0.1")]), _slice("b", [_endpoint("10.0.0.2")])])
    sink.replace([_slice("b", [_endpoint("10.0.0.2")])])
    assert [e.url for e in directory.endpoints(OLD.key)] == ["http://10.0.0.2:8000"]


MODELS: dict[str, tuple[dict[str, Any], tuple[str, int, tuple[str, ...]]]] = {
    "the shortest there is": (
        {"spec": {"model": {"source": "pvc://m/x"}}},
        ("tiny", 1700000000, ()),
    ),
    "one with a served name and adapters": (
        {
            "spec": {"model": {"servedName": "Big/Name"}},
            "status": {
                "adapters": [
                    {"name": "b", "readyReplicas": 2},
                    {"name": "a", "readyReplicas": 1},
                    {"name": "loading", "readyReplicas": 0},
                ]
            },
        },
        ("Big/Name", 1700000000, ("a", "b")),
    ),
    "one that makes no sense": (
        {"spec": None, "status": {"adapters": [None, {}, 7]}},
        ("tiny", 1700000000, ()),
    ),
}


@pytest.mark.parametrize(("content", "expected"), MODELS.values(), ids=MODELS)
def test_a_deployment_is_read(
    content: dict[str, Any], expected: tuple[str, int, tuple[str, ...]]
) -> None:
    metadata = {
        "name": "tiny",
        "namespace": "team",
        "creationTimestamp": "2023-11-14T22:13:20Z",
    }
    model = parse_model({"metadata": metadata, **content})
    assert (model.name, model.created_at_s, model.adapters) == expected


def test_deployments_come_and_go() -> None:
    directory = Directory()
    sink = ModelSink(directory)
    item = {"metadata": {"name": "tiny", "namespace": "team"}, "spec": {}}
    sink.put(item)
    assert directory.names() == ["tiny"]
    sink.drop(item)
    assert directory.names() == []
    sink.replace([item])
    assert directory.names() == ["tiny"]


async def test_waiting_ends_with_a_change_and_not_with_a_repeat() -> None:
    directory = Directory()
    directory.put_model(OLD)
    waiting = asyncio.create_task(directory.wait_for_change(60))
    await asyncio.sleep(0)
    directory.put_model(OLD)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    directory.put_slice(("team", "s"), deployment=OLD.key, endpoints=())
    await asyncio.wait_for(waiting, 30)


# Choosing.

A, B, C = (Endpoint(f"http://{name}") for name in "abc")


def test_the_replica_with_the_fewest_requests_is_next() -> None:
    balancer = Balancer(eject_s=5)
    with balancer.lease(A.url), balancer.lease(A.url), balancer.lease(B.url):
        assert balancer.choose((A, B)) == B
        assert balancer.choose((A, B, C)) == C
    assert balancer.in_flight(A.url) == 0


def test_equal_replicas_take_turns() -> None:
    balancer = Balancer(eject_s=5)
    order = []
    for _ in range(6):
        chosen = balancer.choose((A, B, C))
        assert chosen is not None
        order.append(chosen)
        with balancer.lease(chosen.url):
            pass
    assert order == [A, B, C, A, B, C]


def test_a_replica_that_failed_is_last_until_its_time_is_over() -> None:
    clock = Clock()
    balancer = Balancer(eject_s=5, clock=clock)
    balancer.outliers.note_failure(A.url)
    with balancer.lease(B.url):
        assert balancer.choose((A, B)) == B
        assert balancer.choose((A,)) == A
        assert balancer.choose((A, B), without={B.url}) == A
        clock.now += 6
        assert balancer.choose((A, B)) == A


def test_a_replica_that_answers_is_forgiven_at_once() -> None:
    balancer = Balancer(eject_s=5)
    balancer.outliers.note_failure(A.url)
    balancer.outliers.note_success(A.url)
    with balancer.lease(B.url):
        assert balancer.choose((A, B)) == A


def test_nothing_is_chosen_from_nothing() -> None:
    balancer = Balancer(eject_s=5)
    assert balancer.choose(()) is None
    assert balancer.choose((A,), without={A.url}) is None
