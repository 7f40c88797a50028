"""Nodes, pods and jobs become what the arbiter decides on. Pure: documents in, values out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from mizzen.operator.crds.common import Json
from mizzen.operator.desired import labels
from mizzen.operator.planning.lending import Want
from mizzen.operator.planning.placement import Gang
from mizzen.operator.planning.preemption import Lease
from mizzen.operator.status.conditions import parse_rfc3339

_KEEPS_PODS_AWAY = ("NoSchedule", "NoExecute")
_ENDED = ("Succeeded", "Failed")
# A replica has two and a half minutes to leave if its user names no other time. For a pod that
# may take hours nobody is to wait while a borrower could leave in seconds.
_SOON = timedelta(minutes=3)
# Past its grace a pod of a node that answers is gone in seconds.
_OVERDUE = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Node:
    """A node that takes pods."""

    name: str
    hostname: str
    devices: Mapping[str, int]  # allocatable, by resource
    labels: Mapping[str, str]
    taints: tuple[Json, ...]

    def takes(self, selector: Mapping[str, str], tolerations: Iterable[Json]) -> bool:
        """Whether pods with this selector and these tolerations may go there."""
        tolerated = list(tolerations)
        return all(self.labels.get(key) == value for key, value in selector.items()) and all(
            any(_tolerates(toleration, taint) for toleration in tolerated)
            for taint in self.taints
            if taint.get("effect") in _KEEPS_PODS_AWAY
        )


@dataclass(frozen=True, slots=True)
class Replica:
    """The pods of a serving replica that have no node, and what they want."""

    want: Want
    pods: tuple[Json, ...]  # by rank


def read_nodes(documents: Iterable[Json]) -> dict[str, Node]:
    """Return the nodes that are ready and not cordoned, by name."""
    nodes = {}
    for document in documents:
        spec, status = document.get("spec") or {}, document.get("status") or {}
        is_ready = any(
            condition.get("type") == "Ready" and condition.get("status") == "True"
            for condition in status.get("conditions") or []
        )
        if spec.get("unschedulable") or not is_ready:
            continue
        name = document["metadata"]["name"]
        own = document["metadata"].get("labels") or {}
        nodes[name] = Node(
            name=name,
            hostname=own.get(labels.HOSTNAME, name),
            devices=_devices(status.get("allocatable") or {}),
            labels=own,
            taints=tuple(spec.get("taints") or ()),
        )
    return nodes


def devices_of(pod: Json, resource: str) -> int:
    """Return how many devices the pod holds, as the scheduler counts them.

    All containers together, or an init container where that needs more; a sidecar, which is an
    init container that is restarted, stays beside all that start after it.

    Source: Kubernetes, "Sidecar containers", resource sharing within containers.
    """
    spec = pod.get("spec") or {}

    def asked(container: Json) -> int:
        resources = container.get("resources") or {}
        amount = (resources.get("limits") or resources.get("requests") or {}).get(resource, 0)
        return _count(amount)

    first = sidecars = 0
    for container in spec.get("initContainers") or []:
        first = max(first, sidecars + asked(container))
        if container.get("restartPolicy") == "Always":
            sidecars += asked(container)
    return max(first, sidecars + sum(map(asked, spec.get("containers") or [])))


def node_of(pod: Json, nodes: Mapping[str, Node]) -> str | None:
    """Return the node a pod is on, or is bound to and will be on."""
    if labels.CAPACITY_GATE in labels.gates_of(pod):
        return None  # a selector of its own only says where it may go
    spec = pod.get("spec") or {}
    if spec.get("nodeName"):
        return str(spec["nodeName"])
    hostname = (spec.get("nodeSelector") or {}).get(labels.HOSTNAME)
    return next((node.name for node in nodes.values() if node.hostname == hostname), None)


def is_over(pod: Json) -> bool:
    """Whether the pod holds nothing any more."""
    return (pod.get("status") or {}).get("phase") in _ENDED


def read_held(pods: Iterable[Json], nodes: Mapping[str, Node], resource: str) -> dict[str, int]:
    """Return the devices of this resource in use, by node, whoever uses them."""
    held: dict[str, int] = defaultdict(int)
    for pod in pods:
        if not is_over(pod) and (node := node_of(pod, nodes)):
            held[node] += devices_of(pod, resource)
    return dict(held)


def read_returning(
    pods: Iterable[Json],
    jobs: Mapping[str, Json],
    nodes: Mapping[str, Node],
    resource: str,
    *,
    now: datetime,
) -> dict[str, int]:
    """Return the devices, by node, of pods that are about to be gone; those of `jobs` are leases.

    Not of a pod that should have been gone already: it is stuck.
    """
    ending = (pod for pod in pods if job_of(pod) not in jobs and _is_ending(pod, now))
    return read_held(ending, nodes, resource)


def read_leases(
    pods: Iterable[Json],
    jobs: Mapping[str, Json],
    nodes: Mapping[str, Node],
    resource: str,
    *,
    now: datetime,
) -> list[Lease]:
    """Return what our jobs hold; `jobs` are the resources by NAMESPACE/NAME."""
    members: dict[str, list[Json]] = defaultdict(list)
    for pod in pods:
        name = job_of(pod) or ""
        if name in jobs and not is_over(pod) and devices_of(pod, resource):
            members[name].append(pod)
    return [_lease(name, members[name], jobs[name], nodes, resource, now) for name in members]


def job_of(pod: Json) -> str | None:
    """Return the NAMESPACE/NAME of the job whose trainer the pod is; Kueue's jobs are not ours."""
    own = pod["metadata"].get("labels") or {}
    if own.get(labels.ROLE) != labels.ROLE_TRAINER or labels.KUEUE_QUEUE in own:
        return None
    return f"{pod['metadata']['namespace']}/{own.get(labels.JOB, '')}"


def read_replicas(pods: Iterable[Json], nodes: Mapping[str, Node], resource: str) -> list[Replica]:
    """Return the replicas of whose pods some have no node, once all their pods are there."""
    members: dict[str, list[Json]] = defaultdict(list)
    for pod in pods:
        own = pod["metadata"].get("labels") or {}
        if own.get(labels.ROLE) == labels.ROLE_RUNTIME and devices_of(pod, resource):
            place = (own.get(key, "") for key in (labels.DEPLOYMENT, labels.REVISION, labels.SLOT))
            members["/".join((pod["metadata"]["namespace"], *place))].append(pod)
    return [
        Replica(_want(name, waiting, nodes, resource), waiting)
        for name, group in members.items()
        if (waiting := _waiting(group, nodes))
    ]


def gang_nodes(
    selector: Mapping[str, str], tolerations: Iterable[Json], nodes: Mapping[str, Node]
) -> frozenset[str]:
    """Return the nodes that pods may go to."""
    allowed = list(tolerations)
    return frozenset(node.name for node in nodes.values() if node.takes(selector, allowed))


def _waiting(group: list[Json], nodes: Mapping[str, Node]) -> tuple[Json, ...]:
    if any("deletionTimestamp" in pod["metadata"] for pod in group):
        return ()
    if any(labels.GROUP_GATE in labels.gates_of(pod) for pod in group):
        return ()  # not complete yet
    waiting = [pod for pod in group if not is_over(pod) and node_of(pod, nodes) is None]
    return tuple(sorted(waiting, key=_rank))


def _rank(pod: Json) -> int:
    """Return the pod's place; anybody's pod may have some labels of a replica, and not this one."""
    return _count(pod["metadata"]["labels"].get(labels.RANK))


def _want(name: str, waiting: tuple[Json, ...], nodes: Mapping[str, Node], resource: str) -> Want:
    spec = waiting[0]["spec"]
    selector, tolerations = spec.get("nodeSelector") or {}, spec.get("tolerations") or ()
    return Want(
        name=name,
        gang=Gang(
            len(waiting),
            devices_of(waiting[0], resource),
            gang_nodes(selector, tolerations, nodes),
        ),
        is_gated=any(labels.CAPACITY_GATE in labels.gates_of(pod) for pod in waiting),
        since=parse_rfc3339(waiting[0]["metadata"]["creationTimestamp"]),
    )


def _lease(
    name: str,
    pods: list[Json],
    job: Json,
    nodes: Mapping[str, Node],
    resource: str,
    now: datetime,
) -> Lease:
    spec, status = job.get("spec") or {}, job.get("status") or {}
    devices: dict[str, int] = defaultdict(int)
    for pod in pods:
        if node := node_of(pod, nodes):
            devices[node] += devices_of(pod, resource)
    started_at = min(parse_rfc3339(pod["metadata"]["creationTimestamp"]) for pod in pods)
    last = max(started_at, _saved_at(status) or started_at)
    return Lease(
        job=name,
        devices=dict(devices),
        started_at=started_at,
        is_reclaimable=bool((spec.get("spareCapacity") or {}).get("enabled")),
        is_leaving=bool(spec.get("suspend")) or any(map(_is_leaving, pods)),
        priority=int(spec.get("priority") or 0),
        unsaved_s=max(0.0, (now - last).total_seconds()),
        yield_s=float((status.get("lending") or {}).get("slowestYieldSeconds") or 0.0),
    )


def _saved_at(status: Json) -> datetime | None:
    """Return when the last checkpoint was committed, as far as the trainer's words tell."""
    try:
        saved_at = parse_rfc3339(str((status.get("checkpoint") or {}).get("committedAt")))
    except ValueError:
        return None  # one trainer's odd words must not keep devices from everybody
    return saved_at if saved_at.tzinfo else None


def _is_leaving(pod: Json) -> bool:
    metadata = pod["metadata"]
    annotations = metadata.get("annotations") or {}
    return "deletionTimestamp" in metadata or labels.RECLAIMED_AT in annotations


def _is_ending(pod: Json, now: datetime) -> bool:
    # The time says when its grace is over, not when it was deleted.
    until = pod["metadata"].get("deletionTimestamp")
    return until is not None and -_OVERDUE < parse_rfc3339(until) - now <= _SOON


def _devices(allocatable: Mapping[str, object]) -> dict[str, int]:
    """Return the extended resources: their names have a slash, their amounts are whole."""
    return {name: _count(amount) for name, amount in allocatable.items() if "/" in name}


def _count(amount: object) -> int:
    text = str(amount)
    return int(text) if text.isdigit() else 0


def _tolerates(toleration: Json, taint: Json) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint.get("key"))
    return toleration.get("key") == taint.get("key") and (toleration.get("value") or "") == (
        taint.get("value") or ""
    )
