"""A canary by the controller: replicas beside those that are proven, step by step, or back."""

from __future__ import annotations

from typing import Any

from mizzen.operator.engine.results import Retryable
from mizzen.operator.planning.canary import Answers
from tests.fixtures.serving_world import World
from tests.unit.test_llmdeployment_rollout import go_on, quota_of, revisions

STEPS = [{"weight": 10, "holdSeconds": 30}, {"weight": 50, "holdSeconds": 30}]
PROBE = {"prompt": "2 + 2 =", "expect": r"\b4\b"}
INF = float("inf")


def answers(requests: int, failures: int = 0, *, p90_s: float = 0.1) -> Answers:
    edges = {p90_s: 0.9 * requests, 2 * p90_s: float(requests), INF: float(requests)}
    return Answers(requests, failures, edges)


async def begun(replicas: int = 4, **on: Any) -> World:
    """Return a world whose canary's first replica is about to be made."""
    rollout = {"canary": {"steps": STEPS, "rollbackOn": on}}
    world = World(replicas=replicas, rollout=rollout)
    await world.settle()
    world.runtimes.answer = " 4."
    world.change(engine={"maxNumSeqs": 4})
    return world


def count(world: World, *, canary: Answers, stable: Answers) -> None:
    """Have the gateways tell what they counted of each revision."""
    rollout = world.status["rollout"]
    world.metrics.answers = {rollout["revision"]: canary, rollout["stable"]: stable}


def state(world: World) -> tuple[int, int]:
    canary = world.status["rollout"]["canary"]
    return canary["step"], canary["weight"]


async def test_a_canary_grows_step_by_step_and_then_replaces_everything() -> None:
    world = await begun()
    await world.look()
    assert state(world) == (0, 0)
    assert revisions(world) == {"first": 4, "4": 1}
    await go_on(world, 10)
    assert state(world) == (0, 10)
    assert revisions(world) == {"first": 4, "4": 1}
    assert world.condition("Progressing") == ("True", "RollingOut", "Canary step 1 of 2 at 10 %.")
    await go_on(world, 60)
    assert state(world) == (1, 50)
    assert revisions(world) == {"first": 2, "4": 2}
    await go_on(world, 60)
    await world.settle()
    assert revisions(world) == {"4": 4}
    assert "rollout" not in world.status
    assert world.condition("Ready")[0] == "True"


async def test_while_a_canary_holds_nothing_is_written() -> None:
    world = await begun(errorRatio=0.05)
    await go_on(world, 20)
    count(world, canary=answers(10), stable=answers(90))
    written = len(world.api.writes)
    world.restart_operator()
    for number in range(10):
        count(world, canary=answers(10 + number), stable=answers(90 + number))
        await world.look()
    assert len(world.api.writes) == written


async def test_a_canary_whose_requests_fail_goes_back_by_itself_with_the_figures() -> None:
    world = await begun(errorRatio=0.05)
    await go_on(world, 20)
    count(world, canary=answers(40, 8), stable=answers(360, 2))
    await world.look()
    assert "canary" not in world.status["rollout"]  # so the gateways send it nothing more
    await world.settle()
    assert revisions(world) == {"first": 4}
    failed = world.status["rollout"]["failure"]
    assert failed["reason"] == "CanaryErrors"
    assert failed["message"] == (
        "8 of 40 requests failed at the canary and 2 of 360 at the revision before; errorRatio "
        "allows 0.05 more."
    )
    assert world.condition("Progressing")[:2] == ("False", "RolledBack")
    assert failed["message"] in world.condition("Ready")[2]
    events = [e for e in world.api.kind("Event").values() if e["reason"] == "RolledBack"]
    assert len(events) == 1


async def test_a_slow_canary_goes_back_by_itself() -> None:
    world = await begun(ttftFactor=1.5)
    await go_on(world, 20)
    count(world, canary=answers(40, p90_s=0.4), stable=answers(360))
    await world.settle()
    assert revisions(world) == {"first": 4}
    assert world.status["rollout"]["failure"]["reason"] == "CanarySlow"


async def test_a_canary_that_talks_nonsense_never_gets_a_request() -> None:
    world = await begun(probe=PROBE)
    world.runtimes.answer = " fish"
    weights = set()
    for _ in range(8):
        await go_on(world, 5)
        weights.add((world.status["rollout"].get("canary") or {}).get("weight", 0))
    await world.settle()
    assert weights == {0}
    assert revisions(world) == {"first": 4}
    failed = world.status["rollout"]["failure"]
    assert failed["reason"] == "CanaryProbeFailed"
    assert "' fish'" in failed["message"]
    assert {prompt for _, _, prompt in world.runtimes.prompted} == {"2 + 2 ="}
    assert {model for _, model, _ in world.runtimes.prompted} == {"smollm2"}


async def test_every_step_begins_with_the_probe_and_no_look_in_between_asks_it() -> None:
    world = await begun(probe=PROBE)
    await go_on(world, 30)
    assert len(world.runtimes.prompted) == 1
    await go_on(world, 40)
    assert state(world) == (1, 50)
    assert len(world.runtimes.prompted) == 2


async def test_a_canary_waits_while_the_gateways_tell_nothing() -> None:
    world = await begun(errorRatio=0.05)
    await go_on(world, 300)
    assert state(world) == (0, 10)
    assert "do not tell" in world.condition("Progressing")[2]
    count(world, canary=answers(40), stable=answers(360))
    world.metrics.age_s = 1e6
    await go_on(world, 60)
    assert state(world) == (0, 10)
    world.metrics.age_s = 0
    await go_on(world, 10)
    assert world.status["rollout"]["canary"]["passed"] == (
        "0 of 40 requests failed, TTFT p90 0.1 s against 0.1 s"
    )


async def test_a_paused_canary_stays_at_its_step() -> None:
    world = await begun()
    await go_on(world, 15)
    rollout = world.resource["spec"]["rollout"]
    world.change(rollout=rollout | {"paused": True})
    await go_on(world, 300)
    assert state(world) == (0, 10)
    assert world.condition("Ready")[1] == "Paused"
    world.change(rollout=rollout)
    await go_on(world, 60)
    await world.settle(looks=80)
    assert revisions(world) == {"4": 4}


async def test_steps_that_are_taken_out_of_the_spec_end_the_canary() -> None:
    world = await begun()
    await go_on(world, 15)
    world.change(rollout={})
    await world.settle()
    assert revisions(world) == {"4": 4}


async def test_one_replica_gets_a_canary_beside_it() -> None:
    world = await begun(1)
    await go_on(world, 20)
    assert revisions(world) == {"first": 1, "4": 1}
    assert state(world) == (0, 10)


async def test_a_canary_is_judged_also_while_a_quota_refuses_pods() -> None:
    world = await begun(errorRatio=0.05)
    await go_on(world, 20)
    assert state(world) == (0, 10)
    world.change(replicas=8)
    world.api.fault = quota_of(len(world.pods), world)
    result = await world.look()
    assert isinstance(result, Retryable)
    assert result.within_s == 10
    count(world, canary=answers(40, 8), stable=answers(360, 2))
    await world.look()
    assert world.status["rollout"]["failure"]["reason"] == "CanaryErrors"


async def test_a_canary_that_is_scaled_to_zero_is_judged_when_it_is_back() -> None:
    world = await begun(probe=PROBE)
    await world.look()
    world.change(replicas=0)
    await go_on(world, 300)
    assert (world.pods, world.status["phase"]) == ([], "Stopped")
    assert state(world) == (0, 0)
    assert world.runtimes.prompted == []
    world.change(replicas=2)
    world.runtimes.answer = " fish"
    await go_on(world, 60)
    assert world.status["rollout"]["failure"]["reason"] == "CanaryProbeFailed"
    assert revisions(world) == {"first": 2}


async def test_a_revision_that_came_at_zero_begins_with_its_canary() -> None:
    world = await begun()
    world.change(replicas=0)
    await go_on(world, 60)
    world.change(engine={"maxNumSeqs": 5})
    await go_on(world, 60)
    world.change(replicas=4)
    await go_on(world, 20)
    assert revisions(world) == {"first": 4, "5": 1}
    assert state(world) == (0, 10)
    await go_on(world, 120)
    await world.settle()
    assert revisions(world) == {"5": 4}


async def test_an_expectation_that_is_no_pattern_is_refused_with_its_place() -> None:
    world = World(
        rollout={
            "canary": {
                "steps": STEPS, "rollbackOn": {"probe": {"prompt": "x", "expect": "("}},
            }
        }
    )  # fmt: skip
    await world.look()
    status, reason, message = world.condition("Accepted")
    assert (status, reason) == ("False", "InvalidSpec")
    assert "expect" in message and "no regular expression" in message
