"""The Gateway API's objects of a deployment: made, kept, removed, and what may go wrong there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mizzen.operator.config import OperatorConfig
from mizzen.operator.engine.results import Done, Requeue
from mizzen.operator.gateway_api import GatewayApi
from mizzen.operator.kube.errors import Invalid, KubeError, NotFound, Unavailable
from tests.fixtures.serving_world import CRS, KEY, World

Json = dict[str, Any]
POOL, ROUTE = "InferencePool", "HTTPRoute"
ROUTES = "/apis/gateway.networking.k8s.io/v1/namespaces/team/httproutes"
POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/team/inferencepools"
BOTH = {"parent_gateway": "front", "endpoint_picker": "{deployment}-epp"}


class PartOfAnApi:
    """Passes requests on, but for those that `fault` fails by their path."""

    def __init__(self, world: World) -> None:
        self._inner = world.api
        self.fault: Callable[[str], KubeError | None] = lambda path: None
        world.kube.transport = self

    async def request(self, method: str, path: str, **more: Any) -> Any:
        if (error := self.fault(path)) is not None:
            raise error
        return await self._inner.request(method, path, **more)


def without(*plurals: str) -> Callable[[str], KubeError | None]:
    """Return the fault of a cluster that lacks these kinds."""
    return lambda path: NotFound(status=404) if any(p in path for p in plurals) else None


async def operator_with(world: World, **settings: Any) -> None:
    """Let an operator with these settings see what there is."""
    world.restart_operator()
    world.facts = replace(world.facts, gateway_api=GatewayApi(OperatorConfig(**settings)))
    await world.facts.gateway_api.look(world.kube)


async def settled(world: World, **settings: Any) -> None:
    """Let an operator with these settings bring the deployment to rest."""
    await operator_with(world, **settings)
    await world.settle()


def kinds(world: World) -> set[str]:
    return {d["kind"] for d in world.api.objects.values()} & {POOL, ROUTE}


def warnings(world: World) -> list[tuple[str, str]]:
    events = world.api.kind("Event").values()
    return [(e["reason"], e["message"]) for e in events if e["type"] == "Warning"]


def refuse_routes(method: str, path: str) -> None:
    if "httproutes" in path:
        raise Invalid("The API server refuses: spec.parentRefs: unknown.", status=422)


async def test_a_deployment_gets_its_pool_and_route_and_then_nothing_more_is_written() -> None:
    world = World()
    await settled(world, **BOTH)
    assert kinds(world) == {POOL, ROUTE}
    before = len(world.api.writes)
    assert await world.facts.gateway_api.look(world.kube) == set()
    await world.look()
    assert len(world.api.writes) == before


async def test_nothing_is_asked_of_a_deployment_whose_installation_names_no_gateway() -> None:
    world = World()
    await settled(world)
    assert not kinds(world)


async def test_kinds_that_are_missing_are_no_error_and_are_noticed_when_they_come() -> None:
    world = World()
    world.facts = replace(world.facts, gateway_api=GatewayApi(OperatorConfig(**BOTH)))
    part = PartOfAnApi(world)
    part.fault = without("inferencepools", "httproutes")
    assert await world.facts.gateway_api.look(world.kube) == set()
    await world.settle()
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")
    assert not kinds(world) and not warnings(world)
    part.fault = without("inferencepools")
    assert await world.facts.gateway_api.look(world.kube) == {KEY}
    await world.look()
    [rule] = world.api.objects[f"{ROUTES}/smollm2"]["spec"]["rules"]
    assert rule["backendRefs"][0]["kind"] == "Service"
    part.fault = without()
    assert await world.facts.gateway_api.look(world.kube) == {KEY}
    await world.look()
    [rule] = world.api.objects[f"{ROUTES}/smollm2"]["spec"]["rules"]
    assert rule["backendRefs"][0]["kind"] == POOL
    assert kinds(world) == {POOL, ROUTE}


async def test_a_kind_that_goes_takes_the_pool_out_of_the_route() -> None:
    world = World()
    await settled(world, **BOTH)
    world.api.drop(f"{POOLS}/smollm2")
    PartOfAnApi(world).fault = without("inferencepools")
    assert await world.facts.gateway_api.look(world.kube) == {KEY}
    assert not world.facts.store.all(POOL)
    await world.settle()
    [rule] = world.api.objects[f"{ROUTES}/smollm2"]["spec"]["rules"]
    assert rule["backendRefs"][0]["kind"] == "Service"


async def test_what_an_earlier_setting_made_is_removed_by_an_operator_without_it() -> None:
    world = World()
    await settled(world, **BOTH)
    await settled(world, parent_gateway="front")
    assert kinds(world) == {ROUTE}
    [rule] = world.api.objects[f"{ROUTES}/smollm2"]["spec"]["rules"]
    assert rule["backendRefs"][0]["kind"] == "Service"
    await settled(world)
    assert not kinds(world)


async def test_a_route_that_somebody_deleted_or_changed_is_put_right() -> None:
    world = World()
    await settled(world, **BOTH)
    world.api.on_change = lambda kind, document: None  # nobody watches them
    route = world.api.objects[f"{ROUTES}/smollm2"]
    world.api.put(f"{ROUTES}/smollm2", route | {"spec": {"parentRefs": [{"name": "other"}]}})
    world.api.drop(f"{POOLS}/smollm2")
    assert await world.facts.gateway_api.look(world.kube) == {KEY}
    await world.look()
    assert world.api.objects[f"{ROUTES}/smollm2"]["spec"]["parentRefs"] == [{"name": "front"}]
    assert kinds(world) == {POOL, ROUTE}


async def test_what_gateways_say_in_the_status_is_no_reason_to_look_again() -> None:
    world = World()
    await settled(world, **BOTH)
    world.api.on_change = lambda kind, document: None
    route = world.api.objects[f"{ROUTES}/smollm2"]
    world.api.put(f"{ROUTES}/smollm2", route | {"status": {"parents": [{"controllerName": "x"}]}})
    assert await world.facts.gateway_api.look(world.kube) == set()


async def test_both_go_with_the_deployment() -> None:
    world = World()
    await settled(world, **BOTH)
    world.api.drop(f"{CRS}/smollm2")
    assert isinstance(await world.look(), Done)
    assert not kinds(world)


async def test_a_route_that_somebody_else_made_is_left_alone_and_told_of() -> None:
    world = World()
    await world.settle()
    theirs = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": ROUTE,
        "metadata": {"name": "smollm2", "namespace": "team"},
        "spec": {"parentRefs": [{"name": "theirs"}]},
    }
    world.api.put(f"{ROUTES}/smollm2", theirs)
    await operator_with(world, parent_gateway="front")
    assert await world.look() == Requeue(60.0)
    assert world.api.objects[f"{ROUTES}/smollm2"]["spec"] == theirs["spec"]
    message = (
        "There is an HTTPRoute with this deployment's name that the operator has not made. "
        "Rename or delete it."
    )
    assert warnings(world) == [("RouteNotWritten", message)]
    world.api.drop(f"{ROUTES}/smollm2")
    await world.look()
    assert world.api.objects[f"{ROUTES}/smollm2"]["spec"]["parentRefs"] == [{"name": "front"}]


async def test_a_route_that_is_refused_keeps_no_replica_from_serving() -> None:
    world = World()

    world.api.fault = refuse_routes
    await operator_with(world, **BOTH)
    for _ in range(4):
        result = await world.look()
        world.run_pods()
    assert isinstance(result, Requeue)
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")
    [(reason, message)] = set(warnings(world))
    assert reason == "RouteNotWritten" and "spec.parentRefs" in message


async def test_a_route_that_is_refused_slows_no_drain_and_is_told_once_between_two_looks() -> None:
    world = World(replicas=2)
    await world.settle()
    world.api.fault = refuse_routes
    await operator_with(world, **BOTH)
    for pod in world.pods:
        world.runtimes.in_flight[pod["status"]["podIP"]] = 1
    world.change(replicas=1)
    for _ in range(5):
        result = await world.look()
        assert isinstance(result, Requeue) and result.after_s <= 1
        world.pass_time(1)

    def told() -> int:
        return sum(e["count"] for e in world.api.kind("Event").values() if e["type"] == "Warning")

    assert told() == 1
    await world.facts.gateway_api.look(world.kube)
    await world.look()
    assert told() == 2


async def test_an_api_server_that_does_not_answer_takes_no_route_away() -> None:
    world = World()
    await settled(world, **BOTH)
    PartOfAnApi(world).fault = lambda path: Unavailable() if "httproutes" in path else None
    assert await world.facts.gateway_api.look(world.kube) == set()
    assert world.facts.gateway_api.routing.kinds == {POOL, ROUTE}


async def test_an_installation_for_chosen_namespaces_lists_in_those_only() -> None:
    asked: list[str] = []

    class Lists:
        async def request(self, method: str, path: str, **more: Any) -> Any:
            asked.append(path)
            return {"items": [], "metadata": {"resourceVersion": "1"}}

    world = World()
    world.kube.transport = Lists()
    await GatewayApi(OperatorConfig(watch_namespaces=["team", "other"])).look(world.kube)
    others = [path.replace("/team/", "/other/") for path in (POOLS, ROUTES)]
    assert sorted(asked) == sorted([POOLS, ROUTES, *others])
