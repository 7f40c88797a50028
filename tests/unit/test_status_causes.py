"""Why a pod does not serve: one sentence for each trouble, the same one each time."""

from __future__ import annotations

import json
import re
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from mizzen.operator.status.causes import Cause, first_cause, pod_cause, terminated_cause
from mizzen.operator.status.reasons import Reason

Json = dict[str, Any]


def pod(**status: Any) -> Json:
    names = {"app.kubernetes.io/instance": "smollm2"}
    return {
        "metadata": {"name": "smollm2-abc-0-0", "namespace": "team", "labels": names},
        "status": status,
    }


def container(*, ready: bool = False, last: Json | None = None, **state: Any) -> Json:
    document = {"name": "runtime", "image": "registry/runtime:1", "ready": ready, "state": state}
    return document | ({"lastState": {"terminated": last}} if last else {})


def unscheduled(message: str, reason: str = "Unschedulable") -> Json:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    return pod(phase="Pending", conditions=[condition])


def gated(*gates: str, waits: bool = False) -> Json:
    return unscheduled("gated", reason="SchedulingGated") | {
        "metadata": {"annotations": {"mizzen.dev/waits-since": "now"} if waits else {}},
        "spec": {"schedulingGates": [{"name": gate} for gate in gates]},
    }


LAST_WORDS = json.dumps({"reason": "NotAModel", "message": "No config.json in /mnt/pvc/models."})
CASES: dict[str, tuple[Json, Reason | None, str]] = {
    "nothing to say of a pod that was just made": (pod(phase="Pending"), None, ""),
    "nothing to say of a container that is starting": (
        pod(containerStatuses=[container(waiting={"reason": "ContainerCreating"})]), None, "",
    ),
    "nothing to say of a ready container, whatever was before": (
        pod(containerStatuses=[container(ready=True, last={"exitCode": 1}, running={})]), None, "",
    ),
    "an image that is pulled in vain": (
        pod(containerStatuses=[container(waiting={"reason": "ErrImagePull", "message": "x"})]),
        Reason.IMAGE_PULL_FAILED, "The image registry/runtime:1 cannot be pulled.",
    ),
    "the same while it backs off": (
        pod(containerStatuses=[container(waiting={"reason": "ImagePullBackOff"})]),
        Reason.IMAGE_PULL_FAILED, "The image registry/runtime:1 cannot be pulled.",
    ),
    "a container that cannot be made": (
        pod(containerStatuses=[container(waiting={
            "reason": "CreateContainerConfigError", "message": 'configmap "x" not found'})]),
        Reason.CONTAINER_CONFIG, 'configmap "x" not found',
    ),
    "a bad model, in the runtime's words": (
        pod(containerStatuses=[container(terminated={"exitCode": 42, "message": LAST_WORDS})]),
        Reason.NOT_A_MODEL, "No config.json in /mnt/pvc/models.",
    ),
    "the same while it is started again": (
        pod(containerStatuses=[container(
            running={}, last={"exitCode": 42, "message": LAST_WORDS})]),
        Reason.NOT_A_MODEL, "No config.json in /mnt/pvc/models.",
    ),
    "a Secret that is missing": (
        pod(containerStatuses=[container(waiting={
            "reason": "CreateContainerConfigError", "message": 'secret "hub" not found'})]),
        Reason.SECRET_NOT_FOUND, "There is no Secret hub in the deployment's namespace.",
    ),
    "a Secret without the key": (
        pod(containerStatuses=[container(waiting={
            "reason": "CreateContainerConfigError",
            "message": "couldn't find key HF_TOKEN in Secret team/hub"})]),
        Reason.SECRET_NOT_FOUND, "The Secret hub has no key HF_TOKEN.",
    ),
    "a model that cannot be fetched now, which may pass": (
        pod(containerStatuses=[container(
            waiting={"reason": "CrashLoopBackOff"},
            last={"exitCode": 1, "message": json.dumps(
                {"reason": "SourceUnreachable", "message": "The hub answers 503."})})]),
        Reason.SOURCE_UNREACHABLE, "The hub answers 503.",
    ),
    "bad settings without last words": (
        pod(containerStatuses=[container(terminated={"exitCode": 42})]),
        Reason.RUNTIME_CONFIG_INVALID, "Its settings do not fit together",
    ),
    "too little memory": (
        pod(containerStatuses=[container(terminated={"exitCode": 137, "reason": "OOMKilled"})]),
        Reason.OUT_OF_MEMORY, "Raise spec.podTemplatePatch.resources.limits.memory",
    ),
    "a crash, with the command that shows its log": (
        pod(containerStatuses=[container(
            waiting={"reason": "CrashLoopBackOff"}, last={"exitCode": 139})]),
        Reason.RUNTIME_CRASHED, "kubectl logs -l app.kubernetes.io/instance=smollm2 --previous",
    ),
    "an eviction, without its amounts": (
        pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory. "
            "Threshold quantity: 100Mi, available: 12Ki."),
        Reason.EVICTED, "The node evicted the pod: The node was low on resource: memory.",
    ),
    "a node that refuses": (
        pod(phase="Failed", reason="UnexpectedAdmissionError", message="no GPU 3"),
        Reason.POD_REFUSED, "The node would not run the pod (UnexpectedAdmissionError).",
    ),
    "a claim that is missing": (
        unscheduled('0/9 nodes are available: persistentvolumeclaim "models" not found.'),
        Reason.CLAIM_NOT_FOUND, "There is no PersistentVolumeClaim models in namespace team.",
    ),
    "a claim without a volume": (
        unscheduled("0/9 nodes are available: pod has unbound immediate PersistentVolumeClaims."),
        Reason.CLAIM_NOT_BOUND, "is not bound to a volume",
    ),
    "no room": (
        unscheduled("0/9 nodes are available: 4 Insufficient cpu, 5 Insufficient memory. "
                    "no new claims to deallocate, preemption: 0/9 nodes are available: 9 No "
                    "preemption victims found for incoming pod."),
        Reason.UNSCHEDULABLE,
        "No node has room for the pod: Insufficient cpu, Insufficient memory.",
    ),
    "nothing to say of a pod that is held back on purpose": (
        unscheduled("gated", reason="SchedulingGated"), None, "",
    ),
    "borrowed devices that are on their way back": (
        gated("mizzen.dev/capacity", waits=True),
        Reason.WAITS_FOR_DEVICES, "fine-tune jobs have borrowed",
    ),
    "nothing to say of a pod that waits for the next look at devices": (
        gated("mizzen.dev/capacity"), None, "",
    ),
    "a queue whose Kueue does not look at the pod": (
        gated("kueue.x-k8s.io/admission"),
        Reason.NOT_TAKEN_BY_KUEUE, "Switch its integration `pod` on for this namespace",
    ),
    "nothing to say of devices before the group is complete": (
        gated("mizzen.dev/capacity", "mizzen.dev/group", waits=True), None, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("document", "reason", "part"), CASES.values(), ids=CASES)
def test_the_cause_is(document: Json, reason: Reason | None, part: str) -> None:
    cause = pod_cause(document)
    if reason is None:
        assert cause is None
    else:
        assert cause is not None and cause.reason is reason
        assert part in cause.message
        assert "smollm2-abc-0-0" not in cause.message, "a pod's name would make it flap"


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (10, 20)])
def test_counts_of_nodes_do_not_change_the_sentence(counts: tuple[int, int]) -> None:
    one, two = counts
    document = unscheduled(
        f"0/{one + two} nodes are available: {one} Insufficient cpu, {two} node(s) had untolerated "
        "taint {a: b}."
    )
    cause = pod_cause(document)
    assert cause is not None
    assert cause.message == (
        "No node has room for the pod: Insufficient cpu, node(s) had untolerated taint {a: b}."
    )


def test_of_several_causes_the_same_one_is_told_whatever_the_order() -> None:
    causes = [
        Cause(Reason.UNSCHEDULABLE, "No room."),
        Cause(Reason.RUNTIME_CRASHED, "It crashed."),
        Cause(Reason.NOT_A_MODEL, "No config.json."),
        Cause(Reason.IMAGE_PULL_FAILED, "No image."),
    ]
    assert {first_cause(order) for order in permutations(causes)} == {causes[3]}
    assert {first_cause(order) for order in permutations(causes[:3])} == {causes[2]}
    assert first_cause([]) is None


def test_long_last_words_are_cut() -> None:
    words = json.dumps({"reason": "BadModel", "message": "x" * 5000})
    assert len(terminated_cause({"exitCode": 42, "message": words}).message) == 1000


@pytest.mark.parametrize("words", ['{"reason": 1', "[]", '"text"', '{"message": "x"}', "null"])
def test_last_words_of_another_form_are_passed_on_as_they_are(words: str) -> None:
    cause = terminated_cause({"exitCode": 42, "message": words})
    assert cause == Cause(Reason.RUNTIME_CONFIG_INVALID, words)


def test_every_reason_that_can_end_a_process_is_known_to_the_operator() -> None:
    """The runtime's reasons pass through as they are, so both lists must stay the same."""
    of_requests = {"AdapterLoadFailed", "Asleep", "Draining", "EngineBusy", "GenerationFailed",
                   "InvalidRequest", "PromptTooLong", "UnknownAdapter"}  # fmt: skip
    root = Path(__file__).parents[2] / "runtime"
    said = {
        reason
        for path in root.rglob("*.py")
        for reason in re.findall(
            r'^    reason(?:: ClassVar\[str\])? = "(\w+)"', path.read_text(), re.M
        )
    }
    assert said - of_requests - {reason.value for reason in Reason} == set()
    assert "ModelNotFound" in said
