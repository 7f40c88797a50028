"""What Kueue says of a job in a queue, as the job passes it on."""

from typing import Any

import pytest

from mizzen.operator.desired.queues import is_held
from mizzen.operator.planning.generations import AskToYield, Step, Watch, with_lending
from mizzen.operator.planning.lending import Wait
from mizzen.operator.status.conditions import parse_rfc3339
from mizzen.operator.status.queues import wait_in_queue


def workload(**conditions: tuple[str, str]) -> dict[str, Any]:
    return {
        "status": {
            "conditions": [
                {"type": type_, "status": status, "message": message}
                for type_, (status, message) in conditions.items()
            ]
        }
    }


SAID = {
    "nothing yet": (None, "Kueue has not looked at it yet."),
    "nothing of this generation": (workload(), "Kueue has not looked at it yet."),
    "that there is no quota": (workload(QuotaReserved=("False", "no quota.")), "no quota."),
    "that it was taken back": (
        workload(Evicted=("True", "preempted"), QuotaReserved=("False", "no quota.")), "no quota.",
    ),
    "that a check has not passed": (
        workload(QuotaReserved=("True", "reserved"), Admitted=("False", "a check is pending.")),
        "a check is pending.",
    ),
    "that there is quota": (
        workload(QuotaReserved=("True", "reserved")),
        "it has quota, and the queue's admission checks have not all passed yet.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("found", "words"), SAID.values(), ids=SAID)
def test_kueue_says(found: dict[str, Any] | None, words: str) -> None:
    wait = wait_in_queue("research", found)
    assert wait == Wait(wait.hold, f"The job waits in queue research: {words}")
    assert wait.hold.value == "WaitsInQueue"


@pytest.mark.parametrize(
    ("is_taken", "gates", "expected"),
    [
        (True, ["kueue.x-k8s.io/admission"], True),
        (True, ["kueue.x-k8s.io/topology"], False),
        (True, [], False),
        (False, ["kueue.x-k8s.io/admission"], False),
    ],
)
def test_kueue_holds_a_pod_that_it_has_taken_and_gated(
    is_taken: bool, gates: list[str], expected: bool
) -> None:
    pod = {
        "metadata": {"labels": {"kueue.x-k8s.io/managed": "true"} if is_taken else {}},
        "spec": {"schedulingGates": [{"name": gate} for gate in gates]},
    }
    assert is_held(pod) is expected


@pytest.mark.parametrize("step", [Watch(), AskToYield()])
def test_a_job_that_kueue_takes_the_quota_of_is_never_ended_by_us(step: Step) -> None:
    long_after = with_lending(
        step,
        wait=None,
        reclaimed_at=parse_rfc3339("2026-01-01T00:00:00Z"),
        yield_within_s=None,
        now=parse_rfc3339("2026-01-02T00:00:00Z"),
    )
    assert long_after == AskToYield()
