"""Rollouts that wait, give way and go back, by the controller and an API server in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mizzen.operator.engine.results import Requeue
from mizzen.operator.kube.errors import QuotaExceeded
from tests.fixtures.serving_world import World

Json = dict[str, Any]


def revisions(world: World) -> dict[str, int]:
    """Return how many replicas there are of each revision, by spec.engine.maxNumSeqs."""
    found: dict[str, int] = {}
    for pod in world.pods:
        arguments = pod["spec"]["containers"][0]["args"]
        at = arguments.index("--max-num-seqs") if "--max-num-seqs" in arguments else None
        name = "first" if at is None else arguments[at + 1]
        found[name] = found.get(name, 0) + 1
    return found


def serving(world: World) -> int:
    return sum(
        c["type"] == "Ready" and c["status"] == "True"
        for pod in world.pods
        for c in pod["status"].get("conditions", [])
    )


async def go_on(world: World, seconds: float, *, breaks: str = "") -> None:
    """Let operator and kubelet work; pods of the revision `breaks` never become ready."""
    for _ in range(int(seconds / 5)):
        await world.look()
        for pod in world.pods:
            if breaks and breaks in pod["spec"]["containers"][0]["args"]:
                world.set_status(pod["metadata"]["name"], stuck=True)
        world.run_pods()
        world.pass_time(5)


# Pause.


async def test_a_paused_deployment_gets_no_replica_of_a_new_revision() -> None:
    world = World(replicas=2)
    await world.settle()
    world.change(engine={"maxNumSeqs": 4}, rollout={"paused": True})
    await world.settle()
    assert revisions(world) == {"first": 2}
    assert world.status["phase"] == "Paused"
    assert world.condition("Ready") == (
        "False", "Paused", "0 of 2 replicas are in service with the new revision.",
    )  # fmt: skip
    assert world.condition("Available")[0] == "True"
    world.change(rollout={})
    await world.settle()
    assert revisions(world) == {"4": 2}
    assert "rollout" not in world.status


async def test_a_rollout_paused_half_way_stays_there_and_still_scales_and_mends() -> None:
    world = World(replicas=3)
    await world.settle()
    world.change(engine={"maxNumSeqs": 4})
    while revisions(world) != {"first": 2, "4": 1}:
        await go_on(world, 5)
    world.change(rollout={"paused": True})
    await world.settle()
    assert revisions(world) == {"first": 2, "4": 1}
    world.change(replicas=5)
    await world.settle()
    assert revisions(world) == {"first": 4, "4": 1}
    lost = next(pod for pod in world.pods if "4" not in pod["spec"]["containers"][0]["args"])
    world.api.drop(f"/api/v1/namespaces/team/pods/{lost['metadata']['name']}")
    world.restart_operator()
    await world.settle()
    assert revisions(world) == {"first": 4, "4": 1}
    world.change(rollout={"paused": False})
    await world.settle()
    assert revisions(world) == {"4": 5}


async def test_a_pause_holds_the_way_back_from_a_rollout_whose_last_replicas_still_drain() -> None:
    world = World(replicas=2)
    await world.settle()
    world.change(engine={"maxNumSeqs": 4})
    await go_on(world, 5)
    while world.condition("Ready")[0] != "True":
        await go_on(world, 5)
    assert revisions(world) == {"first": 1, "4": 2}
    world.change(engine={}, rollout={"paused": True})
    await world.settle()
    assert revisions(world) == {"4": 2}
    assert world.condition("Ready")[:2] == ("False", "Paused")


# Back by itself.


async def test_a_revision_that_never_becomes_ready_is_rolled_back_and_not_tried_again() -> None:
    world = World(replicas=2, rollout={"progressDeadlineSeconds": 60})
    await world.settle()
    stable = world.status["revision"]
    world.change(engine={"maxNumSeqs": 4})
    await go_on(world, 50, breaks="4")
    assert revisions(world) == {"first": 2, "4": 1}
    await go_on(world, 30, breaks="4")
    assert revisions(world) == {"first": 2}
    failed = world.status["rollout"]
    assert failed["failure"]["reason"] == "ProgressDeadlineExceeded"
    assert (failed["stable"], world.status["revision"]) == (stable, stable)
    why = (
        f"Revision {failed['revision']} was rolled back to {stable}: No further replica came into "
        "service within 60 seconds (spec.rollout.progressDeadlineSeconds). It is tried again when "
        "the spec changes."
    )
    for type_, status in (("Ready", "False"), ("Progressing", "False"), ("Stalled", "True")):
        assert world.condition(type_) == (status, "RolledBack", why)
    assert world.condition("Available")[0] == "True"
    events = [e for e in world.api.kind("Event").values() if e["reason"] == "RolledBack"]
    assert [(event["type"], event["message"]) for event in events] == [("Warning", why)]
    written = len(world.api.writes)
    world.restart_operator()
    await go_on(world, 600, breaks="4")
    assert len(world.api.writes) == written
    world.change(engine={"maxNumSeqs": 5})
    await world.settle()
    assert revisions(world) == {"5": 2}
    assert world.condition("Ready")[0] == "True"
    assert "rollout" not in world.status


async def test_what_was_rolled_back_half_way_leaves_at_once_and_what_is_proven_is_made_again() -> (
    None
):
    world = World(replicas=3, rollout={"progressDeadlineSeconds": 60})
    await world.settle()
    world.change(engine={"maxNumSeqs": 4})
    while revisions(world).get("first") != 2:
        await go_on(world, 5)
    lowest = 3
    for _ in range(40):
        await go_on(world, 5, breaks="4")
        lowest = min(lowest, serving(world))
    assert revisions(world) == {"first": 3}
    assert lowest >= 2  # the proven ones that were left
    assert world.status["readyReplicas"] == 3


async def test_a_rollback_ends_also_where_the_quota_has_room_for_no_further_pod() -> None:
    rollout = {"progressDeadlineSeconds": 60, "maxSurge": 0, "maxUnavailable": 1}
    world = World(replicas=3, rollout=rollout)
    world.api.fault = quota_of(3, world)
    await world.settle()
    world.change(engine={"maxNumSeqs": 4})
    while revisions(world) != {"first": 1, "4": 2}:
        await go_on(world, 5)
    await go_on(world, 180, breaks="4")
    assert world.status["rollout"]["failure"]["reason"] == "ProgressDeadlineExceeded"
    assert revisions(world) == {"first": 3}
    assert serving(world) == 3


def quota_of(most: int, world: World) -> Callable[[str, str], None]:
    """Return a fault that refuses every pod beyond these."""

    def fault(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/pods") and len(world.all_pods) >= most:
            raise QuotaExceeded

    return fault


async def test_the_spec_before_ends_a_rollback() -> None:
    world = World(rollout={"progressDeadlineSeconds": 60})
    await world.settle()
    before = world.resource["spec"]
    world.change(engine={"maxNumSeqs": 4})
    await go_on(world, 90, breaks="4")
    assert world.status["phase"] == "RolledBack"
    world.write(before)
    await world.settle()
    assert world.status["phase"] == "Ready"
    assert "rollout" not in world.status


async def test_a_long_drain_is_no_reason_to_go_back() -> None:
    world = World(replicas=2, rollout={"progressDeadlineSeconds": 30}, drain={"maxSeconds": 200})
    await world.settle()
    for pod in world.pods:
        world.runtimes.in_flight[pod["status"]["podIP"]] = 1  # a stream that does not end
    world.change(engine={"maxNumSeqs": 4})
    written = []
    for _ in range(120):
        await go_on(world, 5)
        written.append(len(world.api.writes))
    assert revisions(world) == {"4": 2}
    assert "rollout" not in world.status
    assert len(set(written)) < 30, "a drain that goes on is not told again and again"


async def test_a_revision_that_came_while_no_replica_was_wanted_is_rolled_back_all_the_same() -> (
    None
):
    world = World(rollout={"progressDeadlineSeconds": 60})
    await world.settle()
    world.change(replicas=0)
    await world.settle()
    world.change(engine={"maxNumSeqs": 4})
    await go_on(world, 600)
    assert (world.status["phase"], world.condition("Ready")[0]) == ("Stopped", "True")
    written = len(world.api.writes)
    await go_on(world, 60)
    assert len(world.api.writes) == written
    world.restart_operator()
    world.change(replicas=1)
    await go_on(world, 50, breaks="4")
    assert revisions(world) == {"4": 1}
    await go_on(world, 60, breaks="4")
    assert revisions(world) == {"first": 1}
    assert world.status["rollout"]["failure"]["reason"] == "ProgressDeadlineExceeded"


async def test_a_way_back_that_cannot_be_read_any_more_leaves_what_runs_as_it_is() -> None:
    world = World(replicas=2, rollout={"progressDeadlineSeconds": 60})
    await world.settle()
    world.change(engine={"maxNumSeqs": 4})
    await go_on(world, 120, breaks="4")
    assert world.status["phase"] == "RolledBack"
    before = [pod["metadata"]["name"] for pod in world.pods]
    # To this version of the operator, what was recorded is no spec any more.
    for path, document in list(world.api.objects.items()):
        if document["kind"] == "ControllerRevision":
            document["data"]["spec"]["engine"] = {"maxNumSeqs": "many"}
            world.api.put(path, document)
        elif document["kind"] == "Pod":
            del document["metadata"]["annotations"]["mizzen.dev/made-from"]
            world.api.put(path, document)
    world.restart_operator()
    await go_on(world, 60)
    assert [pod["metadata"]["name"] for pod in world.pods] == before
    assert world.status["phase"] == "RolledBack"


async def test_the_operator_looks_again_when_the_deadline_passes() -> None:
    world = World(rollout={"progressDeadlineSeconds": 60})
    await world.settle()
    world.change(engine={"maxNumSeqs": 4})
    await go_on(world, 10, breaks="4")
    result = await world.look()
    assert isinstance(result, Requeue) and result.after_s == 50


# No room.


def unplaced(world: World) -> None:
    """Say of every pod that was not placed yet that no node has room."""
    for pod in world.pods:
        if pod["status"]["phase"] == "Pending" and "stuck" not in pod["status"]:
            since = world.now.strftime("%Y-%m-%dT%H:%M:%SZ")
            refusal = {
                "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                "message": "0/1 nodes are available: 1 Insufficient cpu.",
                "lastTransitionTime": since,
            }  # fmt: skip
            world.set_status(pod["metadata"]["name"], stuck=True, conditions=[refusal])


async def test_a_surge_without_room_gives_way_to_replacing_one_at_a_time() -> None:
    world = World(replicas=2)
    await world.settle()
    world.change(engine={"maxNumSeqs": 4})
    lowest = 2
    for _ in range(120):
        await world.look()
        if len(world.pods) > 2:
            unplaced(world)
        else:  # one has gone: the scheduler finds a place
            for pod in world.pods:
                if pod["status"].get("stuck"):
                    world.start(pod["metadata"]["name"])
        world.run_pods()
        world.pass_time(5)
        lowest = min(lowest, serving(world))
    assert revisions(world) == {"4": 2}
    assert lowest == 1


async def test_the_only_replica_is_not_given_up_for_want_of_room() -> None:
    world = World()
    await world.settle()
    world.change(engine={"maxNumSeqs": 4})
    for _ in range(60):
        await world.look()
        unplaced(world)
        world.pass_time(5)
    assert revisions(world) == {"first": 1, "4": 1}
    assert serving(world) == 1
