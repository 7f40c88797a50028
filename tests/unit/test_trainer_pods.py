"""What the pods of a generation say together."""

from typing import Any

from mizzen.operator.planning.generations import Generation, Outcome
from mizzen.operator.status.trainer_pods import leader_of, newest_generation, telling_pod


def pod(rank: int, *, number: int = 2, of: int = 2, code: int | None = None) -> dict[str, Any]:
    state = {"terminated": {"exitCode": code}} if code is not None else {"running": {}}
    phase = "Running" if code is None else ("Failed" if code else "Succeeded")
    return {
        "metadata": {
            "name": f"job-g{number}-{rank}",
            "labels": {"mizzen.dev/generation": str(number), "mizzen.dev/rank": str(rank)},
            "annotations": {"mizzen.dev/restarts": "1", "mizzen.dev/group-size": str(of)},
        },
        "spec": {"nodeName": "a"},
        "status": {"phase": phase, "containerStatuses": [{"state": state}]},
    }


def outcome(*pods: dict[str, Any], known: int = 2) -> Outcome | None:
    generation = newest_generation(list(pods), {"generation": known})
    return generation.outcome if generation else None


def test_all_of_them_run() -> None:
    found = newest_generation([pod(1), pod(0)], {"generation": 2})
    assert found == Generation(2, Outcome.RUNNING, 1, None, workers=2, placed=2)


def test_a_rank_that_leaves_to_begin_with_fewer_samples_is_no_crash_of_those_that_missed_it() -> (
    None
):
    assert outcome(pod(0, code=76), pod(1, code=75)) is Outcome.YIELDED


def test_they_say_how_many_of_them_share_a_copy() -> None:
    pods = [pod(0), pod(1)]
    for one in pods:
        one["metadata"]["annotations"]["mizzen.dev/tensor"] = "2"
    found = newest_generation(pods, {"generation": 2})
    assert found == Generation(2, Outcome.RUNNING, 1, None, workers=2, placed=2, tensor=2)


def test_one_that_is_gone_is_lost() -> None:
    assert outcome(pod(1, code=76)) is Outcome.LOST
    assert outcome(pod(0)) is Outcome.ENDING


def test_a_generation_that_was_not_wholly_made_does_not_count() -> None:
    before = [pod(0, number=1, of=1, code=75)]
    found = newest_generation([*before, pod(0)], {"generation": 1})
    assert found is not None
    assert (found.number, found.outcome) == (1, Outcome.YIELDED)
    assert newest_generation([pod(0, number=1)], {}) is None


def test_a_worker_on_a_silent_node_is_not_waited_for_but_the_leader_is() -> None:
    leader, worker = pod(0), pod(1)
    for going in (leader, worker):
        going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert outcome(pod(0, code=76), worker) is Outcome.LOST
    assert outcome(leader, pod(1, code=76)) is Outcome.ENDING


def test_the_pod_that_failed_speaks_for_those_that_left_because_of_it() -> None:
    pods = [pod(0, code=76), pod(1, code=1)]
    assert outcome(*pods) is Outcome.CRASHED
    assert telling_pod(pods, Outcome.CRASHED) is pods[1]
    assert leader_of(pods) is pods[0]


def test_a_pod_that_kueue_took_the_quota_of_did_not_crash() -> None:
    killed = pod(0, of=1, code=137)
    assert outcome(killed) is Outcome.CRASHED
    killed["status"]["conditions"] = [
        {
            "type": "TerminationTarget",
            "status": "True",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
    ]
    assert outcome(killed) is Outcome.LOST
