"""Names on the wire: labels, annotations, the readiness gate, ports. Nothing else knows them."""

from __future__ import annotations

from mizzen.operator.crds.common import API_VERSION, Json

FIELD_MANAGER = "mizzen-operator"
STATUS_MANAGER = "mizzen-status"

MANAGED_BY = "app.kubernetes.io/managed-by"
OPERATOR = "mizzen-operator"
INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"

DEPLOYMENT = "mizzen.dev/deployment"
JOB = "mizzen.dev/job"
ROLE = "mizzen.dev/role"
REVISION = "mizzen.dev/revision"
SLOT = "mizzen.dev/slot"
RANK = "mizzen.dev/rank"
GENERATION = "mizzen.dev/generation"
RANKS_OF = "mizzen.dev/ranks-of"  # in DEPLOYMENT's place on what names ranks that take no requests

DRAINING_SINCE = "mizzen.dev/draining-since"
TENSOR = "mizzen.dev/tensor"  # a trainer's: workers that share one copy of the model
GROUP_SIZE = "mizzen.dev/group-size"  # pods that make up the replica
RESTARTS = "mizzen.dev/restarts"  # failures in a row before this replica was made
LAST_FAILURE = "mizzen.dev/last-failure"  # JSON: reason and message of the latest of them
SWAPPING = "mizzen.dev/swapping"  # the revision whose weights it was told to take, till it has
SWAPPED = "mizzen.dev/swapped"  # how often its container had restarted when it got new weights
MADE_FROM = "mizzen.dev/made-from"  # JSON: what the revision was hashed from

WAKE = "mizzen.dev/wake"  # on the LLMDeployment, by the gateways: TIME;held=N

GROUP_GATE = "mizzen.dev/group"  # keeps a pod from being placed before its group is there
CAPACITY_GATE = "mizzen.dev/capacity"  # and before devices are there that a job was using
IN_SERVICE_GATE = "mizzen.dev/in-service"

RECLAIMED_AT = "mizzen.dev/reclaimed-at"  # on a trainer's pod: since when it is to leave
WAITS_SINCE = "mizzen.dev/waits-since"  # and since when a replica waits for that
PREEMPTIONS = "mizzen.dev/preemptions"  # how often its job had to leave before it
USAGE = "mizzen.dev/usage"  # on the leader's Lease, JSON: what each namespace used of late
HOSTNAME = "kubernetes.io/hostname"  # by which a pod is bound to the node it was given
# Kueue's contract for plain pods: which queue, which pods are admitted together, how many.
KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
KUEUE_GROUP = "kueue.x-k8s.io/pod-group-name"
KUEUE_GROUP_COUNT = "kueue.x-k8s.io/pod-group-total-count"
KUEUE_RETRIABLE = "kueue.x-k8s.io/retriable-in-group"
KUEUE_GATE = "kueue.x-k8s.io/admission"  # keeps a pod from being placed before it is admitted
KUEUE_MANAGED = "kueue.x-k8s.io/managed"  # set by Kueue on a pod that it takes care of
KUEUE_STOPPED = "TerminationTarget"  # the condition that it sets on a pod before it deletes it

ROLE_RUNTIME = "runtime"
ROLE_TRAINER = "trainer"

HTTP_PORT = 8000
GRPC_PORT = 8001
ADMIN_PORT = 8002
RANKS_PORT = 8003  # where the pods of a group join their leader

ADMIN_SECRET = "mizzen-admin"
ADMIN_TOKEN_KEY = "token"
ADMIN_TOKEN_FOLDER = "/var/run/mizzen/admin"

MANAGED_SELECTOR = f"{MANAGED_BY}={OPERATOR}"


def base_labels(*, name: str, instance: str, component: str) -> dict[str, str]:
    """Return the labels that every child carries."""
    return {
        "app.kubernetes.io/name": name,
        INSTANCE: instance,
        COMPONENT: component,
        "app.kubernetes.io/part-of": "mizzen",
        MANAGED_BY: OPERATOR,
    }


def deployment_labels(deployment: str) -> dict[str, str]:
    """Return the labels of an LLMDeployment's children."""
    return {
        **base_labels(name="llmdeployment", instance=deployment, component="serving"),
        DEPLOYMENT: deployment,
    }


def deployment_selector(deployment: str) -> str:
    """Return the selector that finds an LLMDeployment's children."""
    return f"{DEPLOYMENT}={deployment}"


def gates_of(pod: Json) -> list[str]:
    """Return the names of the gates that keep the scheduler from placing the pod."""
    return [gate["name"] for gate in (pod.get("spec") or {}).get("schedulingGates") or []]


def owner_reference(kind: str, *, name: str, uid: str) -> Json:
    """Return the reference by which the garbage collector removes a child with its owner."""
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
