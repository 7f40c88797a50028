"""What a pod carries so that Kueue admits it together with the others of its generation. Pure.

Source: Kueue's documentation, "Run Plain Pods", and pkg/controller/jobs/pod of version 0.17.
"""

from __future__ import annotations

from mizzen.operator.crds.common import Json
from mizzen.operator.desired.labels import (
    KUEUE_GATE,
    KUEUE_GROUP,
    KUEUE_GROUP_COUNT,
    KUEUE_MANAGED,
    KUEUE_QUEUE,
    KUEUE_RETRIABLE,
    gates_of,
)


def in_queue(pod: Json, queue: str, *, group: str, pods: int) -> Json:
    """Return the pod as one of a group of so many that waits in a LocalQueue."""
    metadata = pod["metadata"]
    labels = {KUEUE_QUEUE: queue, KUEUE_GROUP: group}
    annotations = {
        KUEUE_GROUP_COUNT: str(pods),
        # An ended pod is never replaced in its group: the next generation is a group of its own.
        # Otherwise Kueue would keep the quota, and the pods by its finalizer, for a replacement.
        KUEUE_RETRIABLE: "false",
    }
    metadata = metadata | {
        "labels": metadata.get("labels", {}) | labels,
        "annotations": metadata.get("annotations", {}) | annotations,
    }
    # Kueue gates the pods that it sees; one that it does not see must not run unadmitted.
    spec = pod["spec"] | {"schedulingGates": [{"name": KUEUE_GATE}]}
    return pod | {"metadata": metadata, "spec": spec}


def is_held(pod: Json) -> bool:
    """Whether Kueue has taken the pod over and holds it back."""
    is_taken = KUEUE_MANAGED in (pod["metadata"].get("labels") or {})
    return is_taken and KUEUE_GATE in gates_of(pod)
