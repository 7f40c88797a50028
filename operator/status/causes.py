"""Why a pod does not serve, read from its status: a reason and a sentence that says what to do.

The same trouble gives the same words every time: no pod names, times or counts are passed on, so
a condition built from them does not flap. Must not know which resource the pod belongs to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mizzen.operator.crds.common import Json
from mizzen.operator.desired.labels import (
    CAPACITY_GATE,
    KUEUE_GATE,
    KUEUE_MANAGED,
    WAITS_SINCE,
    gates_of,
)
from mizzen.operator.status.reasons import Reason, reason_or

BAD_CONFIGURATION_EXIT_CODE = 42
_MESSAGE_LIMIT = 1000

_PULL_REASONS = {
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull",
    "RegistryUnavailable", "ImageInspectError", "SignatureValidationFailed",
}  # fmt: skip
_CONFIG_REASONS = {
    "CreateContainerConfigError", "CreateContainerError", "RunContainerError",
    "PreCreateHookError", "PostStartHookError",
}  # fmt: skip

_CLAIM_MISSING = re.compile(r'persistentvolumeclaim "([^"]+)" (?:not found|is being deleted)')
_CLAIM_UNBOUND = re.compile(r"unbound immediate PersistentVolumeClaims|didn't find available")
_SECRET_MISSING = re.compile(r'secret "([^"]+)" not found')
_KEY_MISSING = re.compile(r"couldn't find key (\S+) in Secret \S+/(\S+)")
_COUNT = re.compile(r"^\d+ ")


@dataclass(frozen=True, slots=True)
class Cause:
    """What stands in the way; `needs_change` where waiting alone will not help."""

    reason: Reason
    message: str
    needs_change: bool = True


_NO_DEVICES = Cause(
    Reason.WAITS_FOR_DEVICES,
    "The replica waits for devices that fine-tune jobs have borrowed and were asked to give back.",
    needs_change=False,
)

_NOT_TAKEN = Cause(
    Reason.NOT_TAKEN_BY_KUEUE,
    "Kueue has not taken the pods over, so it will never admit them. Switch its integration `pod` "
    "on for this namespace (integrations.frameworks and managedJobsNamespaceSelector in its "
    "configuration), then delete the pods: the job makes new ones.",
)

# Where several pods fail for several causes, the first of these is told.
_FIRST_TOLD = (
    Reason.IMAGE_PULL_FAILED, Reason.CONTAINER_CONFIG, Reason.CLAIM_NOT_FOUND,
    Reason.TOO_MANY_DEVICES,
)  # fmt: skip
_LAST_TOLD = (
    Reason.OUT_OF_MEMORY, Reason.RUNTIME_CRASHED, Reason.CLAIM_NOT_BOUND, Reason.UNSCHEDULABLE,
    Reason.POD_REFUSED, Reason.EVICTED, Reason.WAITS_FOR_DEVICES,
)  # fmt: skip


def first_cause(causes: Iterable[Cause]) -> Cause | None:
    """Return the cause to tell people; the same one whatever the order of the pods."""
    return min(causes, key=_rank, default=None)


def pod_cause(pod: Json) -> Cause | None:
    """Return why this pod is not ready, or None where there is nothing to say yet."""
    status = pod.get("status", {})
    for container in status.get("containerStatuses", []):
        if cause := _container_cause(container, pod):
            return cause
    if status.get("phase") == "Failed":
        return _ended_cause(status)
    for condition in status.get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return _scheduling_cause(condition, pod)
    return None


def terminated_cause(terminated: Json, *, instance: str = "") -> Cause:
    """Return what the last words and the exit code of a container mean."""
    code = terminated.get("exitCode")
    last_words = str(terminated.get("message") or "").strip()
    try:
        document = json.loads(last_words)
        reason, message = str(document["reason"]), str(document["message"])
    except (ValueError, KeyError, TypeError):
        reason, message = "", last_words
    if reason and message:
        known = reason_or(reason, Reason.RUNTIME_CONFIG_INVALID)
        return Cause(known, _shorten(message), needs_change=code == BAD_CONFIGURATION_EXIT_CODE)
    if code == BAD_CONFIGURATION_EXIT_CODE:
        what = _shorten(message) or "Its settings do not fit together; its log says which."
        return Cause(Reason.RUNTIME_CONFIG_INVALID, what)
    if terminated.get("reason") == "OOMKilled":
        return Cause(
            Reason.OUT_OF_MEMORY,
            "The container was killed for using more memory than its limit. Raise "
            "spec.podTemplatePatch.resources.limits.memory or lower spec.engine.kvCacheGiB.",
        )
    where = f" -l app.kubernetes.io/instance={instance}" if instance else ""
    return Cause(
        Reason.RUNTIME_CRASHED,
        f"The container ended with exit code {code} and is started again. Its log says why: "
        f"kubectl logs{where} --previous",
        needs_change=False,
    )


def _rank(cause: Cause) -> tuple[int, str, str]:
    if cause.reason in _FIRST_TOLD:
        order = _FIRST_TOLD.index(cause.reason) - len(_FIRST_TOLD)
    elif cause.reason in _LAST_TOLD:
        order = _LAST_TOLD.index(cause.reason) + 1
    else:
        order = 0
    return order, cause.reason.value, cause.message


def _container_cause(container: Json, pod: Json) -> Cause | None:
    if container.get("ready"):
        return None
    state = container.get("state", {})
    waiting = state.get("waiting") or {}
    if waiting.get("reason") in _PULL_REASONS:
        return Cause(
            Reason.IMAGE_PULL_FAILED,
            f"The image {_image(container, pod)} cannot be pulled. Correct its name or tag, or "
            "name the registry's credentials in spec.podTemplatePatch.imagePullSecrets.",
        )
    if waiting.get("reason") in _CONFIG_REASONS:
        return _config_cause(str(waiting.get("message") or ""))
    # A container that is being started again still has the cause of the last end to tell.
    terminated = state.get("terminated") or container.get("lastState", {}).get("terminated")
    if terminated is None:
        return None
    labels = pod.get("metadata", {}).get("labels", {})
    return terminated_cause(terminated, instance=labels.get("app.kubernetes.io/instance", ""))


def _config_cause(message: str) -> Cause:
    if secret := _SECRET_MISSING.search(message):
        return Cause(
            Reason.SECRET_NOT_FOUND,
            f"There is no Secret {secret[1]} in the deployment's namespace. Create it, or correct "
            "its name in the spec (model.credentials or podTemplatePatch).",
        )
    if key := _KEY_MISSING.search(message):
        return Cause(
            Reason.SECRET_NOT_FOUND,
            f"The Secret {key[2]} has no key {key[1]}. Add it to the Secret.",
        )
    return Cause(Reason.CONTAINER_CONFIG, _shorten(message))


def _ended_cause(status: Json) -> Cause:
    reason = str(status.get("reason") or "Failed")
    # The rest of a kubelet's message is amounts, which differ every time.
    detail = str(status.get("message") or "").split(". ")[0].rstrip(".")
    if reason == "Evicted":
        return Cause(Reason.EVICTED, f"The node evicted the pod: {detail}.", needs_change=False)
    return Cause(
        Reason.POD_REFUSED,
        f"The node would not run the pod ({reason}). It is made again.",
        needs_change=False,
    )


def _scheduling_cause(condition: Json, pod: Json) -> Cause | None:
    if condition.get("reason") == "SchedulingGated":
        return _gate_cause(pod)
    message = str(condition.get("message") or "")
    if claim := _CLAIM_MISSING.search(message):
        namespace = pod.get("metadata", {}).get("namespace", "")
        return Cause(
            Reason.CLAIM_NOT_FOUND,
            f"There is no PersistentVolumeClaim {claim[1]} in namespace {namespace}. Create it, "
            "or correct the pvc:// address in the spec.",
        )
    if _CLAIM_UNBOUND.search(message):
        return Cause(
            Reason.CLAIM_NOT_BOUND,
            "A PersistentVolumeClaim of the pod is not bound to a volume. Look at its events: "
            "kubectl describe pvc",
            needs_change=False,
        )
    return Cause(Reason.UNSCHEDULABLE, _unschedulable(message), needs_change=False)


def _gate_cause(pod: Json) -> Cause | None:
    metadata = pod.get("metadata", {})
    gates = gates_of(pod)
    if KUEUE_GATE in gates and KUEUE_MANAGED not in (metadata.get("labels") or {}):
        return _NOT_TAKEN
    is_told = WAITS_SINCE in (metadata.get("annotations") or {})
    return _NO_DEVICES if is_told and gates == [CAPACITY_GATE] else None


def _unschedulable(message: str) -> str:
    """Return the scheduler's sentence without its counts, which change with every node."""
    why = message.partition("nodes are available:")[2] or message
    why = why.partition(" preemption:")[0].partition(". no new")[0]
    parts = sorted({_COUNT.sub("", part.strip(" .")) for part in re.split(r", (?=\d)", why)})
    return f"No node has room for the pod: {_shorten(', '.join(filter(None, parts)))}."


def _image(container: Json, pod: Json) -> str:
    for spec in pod.get("spec", {}).get("containers", []):
        if spec.get("name") == container.get("name"):
            return str(spec.get("image", ""))
    return str(container.get("image", ""))


def _shorten(text: str) -> str:
    return text if len(text) <= _MESSAGE_LIMIT else text[: _MESSAGE_LIMIT - 1] + "…"
