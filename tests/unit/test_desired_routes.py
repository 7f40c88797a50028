"""What an LLMDeployment gets in the cluster's Gateway API, from settings and kinds alone."""

from __future__ import annotations

from typing import Any

import pytest

from mizzen.operator.desired.routes import (
    POOL,
    ROUTE,
    EndpointPicker,
    GatewayRouting,
    ParentGateway,
    build_routes,
)
from mizzen.operator.desired.serving import PodPlace, Serving, build_pod
from tests.fixtures.wanted_serving import serving

Json = dict[str, Any]
GATEWAY = ParentGateway("front", "edge", "https")
PICKER = EndpointPicker("{deployment}-epp", 9002)
BOTH = frozenset({POOL, ROUTE})


def built(wanted: Serving, **routing: Any) -> dict[str, Json]:
    settings = {"gateway": GATEWAY, "picker": PICKER, "kinds": BOTH} | routing
    return {d["kind"]: d for d in build_routes(wanted, GatewayRouting(**settings))}


WHAT_IS_MADE: dict[str, tuple[Json, set[str]]] = {
    "both where both are named and exist": ({}, {POOL, ROUTE}),
    "nothing where no kind exists": ({"kinds": frozenset()}, set()),
    "nothing where nothing is named": ({"gateway": None, "picker": None}, set()),
    "no pool without a picker": ({"picker": None}, {ROUTE}),
    "no pool without its kind": ({"kinds": frozenset({ROUTE})}, {ROUTE}),
    "no route without a Gateway": ({"gateway": None}, {POOL}),
    "no route without its kind": ({"kinds": frozenset({POOL})}, {POOL}),
}


@pytest.mark.parametrize(("routing", "kinds"), WHAT_IS_MADE.values(), ids=WHAT_IS_MADE)
def test_there_is(routing: Json, kinds: set[str]) -> None:
    assert set(built(serving(), **routing)) == kinds


def test_the_pool_is_of_the_pods_that_take_requests_and_names_its_picker() -> None:
    wanted = serving(parallelism={"nodes": 2})
    spec = built(wanted)[POOL]["spec"]
    selector = spec["selector"]["matchLabels"].items()
    leader, follower = (
        build_pod(wanted, PodPlace(revision="r1", slot=0, rank=rank)) for rank in (0, 1)
    )
    assert selector <= leader["metadata"]["labels"].items()
    assert not selector <= follower["metadata"]["labels"].items()
    [container] = leader["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert spec["targetPorts"] == [{"number": ports["http"]}]
    assert spec["endpointPickerRef"] == {"name": "smollm2-epp", "port": {"number": 9002}}


def test_the_route_attaches_to_the_gateway_and_leads_to_the_pool() -> None:
    spec = built(serving())[ROUTE]["spec"]
    assert spec["parentRefs"] == [{"name": "front", "namespace": "edge", "sectionName": "https"}]
    [rule] = spec["rules"]
    assert rule["backendRefs"] == [
        {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "smollm2"}
    ]


def test_without_a_pool_the_route_leads_to_the_service() -> None:
    [rule] = built(serving(), picker=None)[ROUTE]["spec"]["rules"]
    assert rule["backendRefs"] == [{"kind": "Service", "name": "smollm2", "port": 8000}]


def test_a_gateway_beside_the_deployment_needs_only_its_name() -> None:
    spec = built(serving(), gateway=ParentGateway("front"))[ROUTE]["spec"]
    assert spec["parentRefs"] == [{"name": "front"}]


def test_the_route_takes_requests_for_the_model_and_each_adapter() -> None:
    adapters = [{"name": "a", "source": "pvc://models/a"}]
    model = {"source": "pvc://models/smollm2", "servedName": "hub/smollm2"}
    [rule] = built(serving(model=model, adapters=adapters))[ROUTE]["spec"]["rules"]
    assert [match["path"] for match in rule["matches"]] == [
        {"type": "PathPrefix", "value": "/v1"}
    ] * 2
    assert [match["headers"] for match in rule["matches"]] == [
        [{"type": "Exact", "name": "X-Gateway-Model-Name", "value": name}]
        for name in ("hub/smollm2", "hub/smollm2:a")
    ]


def test_many_adapters_take_several_rules_because_one_holds_eight_names() -> None:
    adapters = [{"name": f"a{n}", "source": "pvc://models/a"} for n in range(16)]
    rules = built(serving(adapters=adapters))[ROUTE]["spec"]["rules"]
    assert [len(rule["matches"]) for rule in rules] == [8, 8, 1]
    assert len({rule["backendRefs"][0]["name"] for rule in rules}) == 1


def test_both_go_with_their_deployment_and_are_found_by_its_label() -> None:
    for document in built(serving()).values():
        metadata = document["metadata"]
        assert (metadata["namespace"], metadata["name"]) == ("team", "smollm2")
        assert metadata["ownerReferences"][0]["uid"] == "8c1b2c1e-0000"
        assert metadata["labels"]["mizzen.dev/deployment"] == "smollm2"
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "mizzen-operator"
