"""What is kept of a deployment's past revisions, and what it costs."""

from __future__ import annotations

from typing import Any

from mizzen.operator.crds.llmdeployment import NOT_IN_REVISION
from mizzen.operator.planning.history import restored_spec
from tests.fixtures.serving_world import World

Json = dict[str, Any]


def revisions(world: World) -> dict[int, Json]:
    found = world.api.kind("ControllerRevision").values()
    return {one["revision"]: one for one in sorted(found, key=lambda one: one["revision"])}


def seats(world: World) -> list[int | None]:
    """Return spec.engine.maxNumSeqs of the revisions, the oldest first."""
    return [
        one["data"]["spec"].get("engine", {}).get("maxNumSeqs") for one in revisions(world).values()
    ]


async def test_a_deployment_at_rest_has_no_history() -> None:
    world = World(replicas=2)
    await world.settle()
    assert revisions(world) == {}


async def test_the_second_revision_writes_down_both_and_then_nothing_more() -> None:
    world = World()
    await world.settle()
    first = world.status["revision"]
    world.change(engine={"maxNumSeqs": 4})
    await world.settle()
    assert seats(world) == [None, 4]
    past = revisions(world)[1]
    assert past["metadata"]["name"] == f"smollm2-{first}"
    assert past["metadata"]["ownerReferences"][0]["uid"] == world.resource["metadata"]["uid"]
    assert past["data"]["image"] == "registry/runtime:1"
    assert len(world.api.writes_of("controllerrevisions")) == 2
    world.restart_operator()
    await world.settle()
    assert len(world.api.writes_of("controllerrevisions")) == 2


async def test_old_revisions_are_pruned_to_the_limit() -> None:
    world = World(rollout={"revisionHistoryLimit": 2})
    await world.settle()
    for count in (1, 2, 3, 4):
        world.change(engine={"maxNumSeqs": count})
        await world.settle()
    assert seats(world) == [2, 3, 4]
    world.change(rollout={"revisionHistoryLimit": 0})
    await world.settle()
    assert seats(world) == [4]


async def test_a_deployment_that_rests_at_zero_still_knows_where_it_came_from() -> None:
    world = World()
    await world.settle()
    world.change(replicas=0)
    await world.settle()
    assert world.pods == []
    world.change(engine={"maxNumSeqs": 4})
    await world.settle()
    assert seats(world) == [None, 4]


async def test_going_back_makes_the_same_pods_again() -> None:
    world = World(replicas=2)
    await world.settle()
    first = {pod["metadata"]["labels"]["mizzen.dev/revision"] for pod in world.pods}
    world.change(engine={"maxNumSeqs": 4}, replicas=3)
    await world.settle()
    past = revisions(world)[1]["data"]["spec"]
    world.write(restored_spec(world.resource["spec"], past, kept=NOT_IN_REVISION))
    await world.settle()
    assert {pod["metadata"]["labels"]["mizzen.dev/revision"] for pod in world.pods} == first
    assert len(world.pods) == 3
    assert seats(world) == [4, None]
    assert list(revisions(world)) == [2, 3]


async def test_a_pod_whose_note_was_spoiled_only_loses_its_place_in_the_history() -> None:
    world = World()
    await world.settle()
    (pod,) = world.pods
    pod["metadata"]["annotations"]["mizzen.dev/made-from"] = '{"spec": 1}'
    world.api.put(f"/api/v1/namespaces/team/pods/{pod['metadata']['name']}", pod)
    world.change(engine={"maxNumSeqs": 4})
    await world.settle()
    assert world.condition("Ready")[0] == "True"
    assert revisions(world) == {}
