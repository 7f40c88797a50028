"""The deployment controller against an API server in memory: what is written, when, how often."""

from __future__ import annotations

from mizzen.operator.engine.results import Done, Requeue
from mizzen.operator.status.conditions import rfc3339
from tests.fixtures.serving_world import CRS, World, gates, in_service, names


async def test_one_replica_takes_five_writes_of_its_own_to_ready() -> None:
    world = World()
    await world.settle()
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")
    shared = world.api.writes_of("secrets") + world.api.writes_of("networkpolicies")
    events = world.api.writes_of("events")
    own = [write for write in world.api.writes if write not in shared + events]
    assert [(method, path.rsplit("/", 2)[-2:]) for method, path in own] == [
        ("POST", ["team", "pods"]),
        ("PATCH", [names(world)[0], "status"]),
        ("PATCH", ["smollm2", "status"]),
        ("PATCH", ["services", "smollm2"]),
        ("PATCH", ["smollm2", "status"]),
    ]


async def test_a_hundred_looks_without_a_change_write_nothing() -> None:
    world = World(replicas=2, adapters=[{"name": "a", "source": "pvc://models/a"}])
    await world.settle()
    written = len(world.api.writes)
    for _ in range(100):
        world.pass_time(60)
        await world.look()
    assert len(world.api.writes) == written


async def test_a_restarted_operator_writes_nothing() -> None:
    world = World(replicas=2, adapters=[{"name": "a", "source": "pvc://models/a"}])
    await world.settle()
    written = len(world.api.writes)
    world.restart_operator()
    await world.settle()
    assert len(world.api.writes) == written


async def test_nothing_is_told_between_created_and_ready() -> None:
    world = World()
    await world.look()
    first = world.resource["metadata"]["resourceVersion"]
    name = names(world)[0]
    world.set_status(name, conditions=[{"type": "PodScheduled", "status": "True"}])
    await world.look()
    world.set_status(name, phase="Running", podIP="10.0.0.9")
    await world.look()
    assert world.resource["metadata"]["resourceVersion"] == first


async def test_the_gate_of_a_replica_without_adapters_opens_at_once() -> None:
    """So a replica that has loaded serves even while no operator runs."""
    world = World()
    await world.look()
    assert list(gates(world).values()) == ["True"]
    assert world.condition("Ready")[0] == "False"
    world.run_pods()
    assert in_service(world) == 1


async def test_what_only_the_answer_to_a_write_of_ours_tells_is_not_missed() -> None:
    """The scheduler was quicker than our gate, and the event of its word comes after our answer."""
    world = World()

    def refuse_a_place(method: str, path: str) -> None:
        if method == "PATCH" and "/pods/" in path:
            world.api.objects[path.removesuffix("/status")]["status"]["conditions"] = [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": 'persistentvolumeclaim "models" not found.',
                    "lastTransitionTime": rfc3339(world.now),
                }
            ]

    world.api.fault = refuse_a_place
    result = await world.look()
    assert list(gates(world).values()) == ["True"]
    assert world.condition("Ready")[:2] == ("False", "ClaimNotFound")
    assert isinstance(result, Requeue), "and what follows from it is decided at once"


async def test_a_child_that_drifted_or_went_is_put_right() -> None:
    world = World(replicas=2)
    await world.settle()
    service = "/api/v1/namespaces/team/services/smollm2"
    drifted = world.api.objects[service] | {"spec": {"selector": {"app": "other"}}}
    world.api.put(service, drifted)
    world.api.drop("/apis/policy/v1/namespaces/team/poddisruptionbudgets/smollm2")
    await world.settle()
    selector = world.api.objects[service]["spec"]["selector"]
    assert selector["mizzen.dev/deployment"] == "smollm2"
    assert world.api.kind("PodDisruptionBudget")


async def test_the_budget_and_the_adapters_file_go_when_they_are_not_wanted() -> None:
    world = World(replicas=2, adapters=[{"name": "a", "source": "pvc://models/a"}])
    await world.settle()
    assert world.api.kind("PodDisruptionBudget") and world.api.kind("ConfigMap")
    world.change(replicas=1, adapters=[])
    await world.settle()
    assert not world.api.kind("PodDisruptionBudget")
    assert not world.api.kind("ConfigMap")


async def test_the_last_resource_takes_the_token_and_the_policy_with_it() -> None:
    world = World()
    await world.settle()
    assert "/api/v1/namespaces/team/secrets/mizzen-admin" in world.api.objects
    world.api.drop(f"{CRS}/smollm2")
    assert isinstance(await world.look(), Done)
    assert [d["metadata"]["namespace"] for d in world.api.kind("Secret").values()] == [
        "mizzen-system"
    ]
    assert not world.api.kind("NetworkPolicy")


async def test_a_namespace_made_anew_gets_a_token_again() -> None:
    world = World()
    await world.settle()
    token = "/api/v1/namespaces/team/secrets/mizzen-admin"
    # The namespace is deleted: its secret goes first, and nobody watches secrets.
    follow, world.api.on_change = world.api.on_change, lambda kind, document: None
    world.api.drop(token)
    world.api.on_change = follow
    world.api.drop(f"{CRS}/smollm2")
    await world.look()
    world.write({"model": {"source": "pvc://models/smollm2"}})
    await world.settle()
    assert token in world.api.objects
