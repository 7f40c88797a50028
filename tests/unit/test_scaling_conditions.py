"""What the condition ScalingActive says of a decision, and how often that is written."""

from __future__ import annotations

from typing import Any

import pytest

from mizzen.operator.planning.scale import Decision
from mizzen.operator.planning.scale_rules import Slo
from mizzen.operator.status.reasons import Reason
from mizzen.operator.status.scaling import (
    ScalingSeen,
    is_worth_writing,
    scaling_document,
    scaling_seen,
    state_of,
)
from tests.fixtures.scaled_fleet import Fleet, learned_fleet


def document_of(decision: Decision) -> dict[str, Any]:
    state = state_of(decision, is_dry_run=False)
    return scaling_document(None, decision, desired=decision.replicas, state=state)


def seen(found: Fleet) -> ScalingSeen:
    return scaling_seen({"scaling": document_of(found.decisions[-1])})


def test_a_promise_that_no_number_of_replicas_keeps_is_said_with_the_numbers() -> None:
    step = seen(learned_fleet(slo=Slo(itl_s=0.02)))
    assert (step.is_active, step.reason) == (True, Reason.SLO_UNREACHABLE)
    assert step.message == (
        "slo.itlMs is 20 and a step of an empty replica takes 30 ms. Raise slo.itlMs above that, "
        "or give each replica more or faster devices."
    )
    prompt = seen(learned_fleet(slo=Slo(ttft_s=0.05)))
    assert prompt.reason is Reason.SLO_UNREACHABLE
    assert "slo.ttftMs is 50 and a mean prompt of 500 tokens alone takes 105 ms" in prompt.message


def test_a_bound_that_the_load_exceeds_is_named() -> None:
    found = learned_fleet(max_replicas=3)
    found.run(60, per_s=40.0)
    told = seen(found)
    assert (told.is_active, told.reason) == (True, Reason.SCALING_LIMITED)
    assert told.message.endswith("than the 3 replicas that scaling.max allows.")


def test_a_replica_that_does_not_start_is_named() -> None:
    found = learned_fleet()
    found.never_start = {found.now_s}
    found.run(130, per_s=20.0)
    told = seen(found)
    assert (told.is_active, told.reason) == (True, Reason.REPLICAS_STUCK)
    [name] = found.decisions[-1].stuck[:1]
    assert f"Not started in twice the usual time: {name}" in told.message


AGAIN = {
    "figures of the same state within a minute": ({"message": "a step takes 31 ms"}, 5.0, False),
    "figures of the same state after a minute": ({"message": "a step takes 31 ms"}, 60.0, True),
    "another state at once": ({"state": "FollowsLoad", "message": "It follows."}, 5.0, True),
}


@pytest.mark.parametrize(("change", "after_s", "is_written"), AGAIN.values(), ids=AGAIN)
def test_this_is_written(change: dict[str, str], after_s: float, is_written: bool) -> None:
    decision = learned_fleet(slo=Slo(itl_s=0.02)).decisions[-1]
    before = document_of(decision)
    now_s = decision.at_s + after_s
    assert is_worth_writing(before, {**before, **change}, now_s=now_s) is is_written
