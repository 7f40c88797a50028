"""Pods as the API server shows them become replicas as the planner sees them. Pure.

All that must survive a restart of the operator is read from the pods themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from mizzen.operator.crds.common import Json
from mizzen.operator.desired import labels
from mizzen.operator.planning.rollout import Replica, Standing
from mizzen.operator.status.causes import Cause, pod_cause
from mizzen.operator.status.conditions import parse_rfc3339
from mizzen.operator.status.reasons import Reason, reason_or

# A part of a group that was placed alone for so long gives its devices back: two groups that each
# wait for the rest of what the other one holds would wait for ever.
_HALF_PLACED_FOR = timedelta(minutes=2)
# With the waits between them, ten minutes. A lone pod's kubelet never gives up; here each attempt
# takes the devices of a whole group.
MOST_GROUP_RESTARTS = 6

# As with a kubelet, a replica that ran this long before it failed starts counting anew.
_FORGIVEN_AFTER = timedelta(minutes=10)

# Noted instead of a number of restarts: only a new replica is sure to serve the right weights.
WEIGHTS_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Group:
    """A replica together with the pods it is made of."""

    replica: Replica
    pods: tuple[Json, ...]  # by rank
    missing_ranks: tuple[int, ...] = ()
    draining_since: datetime | None = None
    cause: Cause | None = None  # what keeps it from serving, where anything does

    @property
    def standing(self) -> Standing:
        """Where the replica stands."""
        return self.replica.standing

    @property
    def leader(self) -> Json | None:
        """The pod that serves, where it exists."""
        return self.pods[0] if rank_of(self.pods[0]) == 0 else None

    @property
    def size(self) -> int:
        """How many pods it has when it is complete."""
        return len(self.pods) + len(self.missing_ranks)

    @property
    def is_gated(self) -> bool:
        """Whether the scheduler leaves one of the pods alone until all of the group are there."""
        return any(labels.GROUP_GATE in labels.gates_of(pod) for pod in self.pods)

    @property
    def is_running(self) -> bool:
        """Whether the leader's process lives, so that it can be asked."""
        leader = self.leader
        return (
            leader is not None
            and leader["status"].get("phase") == "Running"
            and any(
                "running" in container.get("state", {})
                for container in leader["status"].get("containerStatuses", [])
            )
        )

    @property
    def address(self) -> str:
        """The leader's address, empty before it has one."""
        return str((self.leader or {}).get("status", {}).get("podIP") or "")

    @property
    def has_loaded(self) -> bool:
        """Whether every process is ready, so that only the gate stands before the traffic."""
        return not self.missing_ranks and all(
            condition_of(pod, "ContainersReady") == "True" for pod in self.pods
        )

    @property
    def is_gate_open(self) -> bool:
        """Whether the gate says in service."""
        leader = self.leader
        return leader is not None and condition_of(leader, labels.IN_SERVICE_GATE) == "True"


def read_groups(pods: Iterable[Json], *, owner_uid: str, now: datetime) -> list[Group]:
    """Return the owner's replicas, by revision and slot. Pods of others are not looked at."""
    members: dict[tuple[str, int], list[Json]] = {}
    for pod in pods:
        place = _place_of(pod, owner_uid)
        if place is not None:
            members.setdefault(place, []).append(pod)
    return [
        _read_group(revision, slot, sorted(members[revision, slot], key=rank_of), now)
        for revision, slot in sorted(members)
    ]


def rank_of(pod: Json) -> int:
    """Return the pod's place in its group."""
    return int(pod["metadata"]["labels"][labels.RANK])


def condition_of(pod: Json, type_: str) -> str:
    """Return the status of one of the pod's conditions, empty where it has none."""
    condition = _condition(pod, type_)
    return str(condition.get("status") or "") if condition else ""


def born_revision(pod_name: str) -> str:
    """Return the revision in a pod's name, which no swap changes."""
    return pod_name.rsplit("-", 3)[1]


def is_leaving(pod: Json) -> bool:
    """Whether the pod has been deleted and its processes are ending."""
    return "deletionTimestamp" in pod["metadata"]


def failure_note(cause: Cause | None) -> str:
    """Return what a successor's annotation says about the failure before it."""
    if cause is None:
        return ""
    return json.dumps({"reason": cause.reason.value, "message": cause.message}, sort_keys=True)


def _place_of(pod: Json, owner_uid: str) -> tuple[str, int] | None:
    metadata = pod["metadata"]
    owners = metadata.get("ownerReferences") or []
    names = metadata.get("labels") or {}
    is_ours = any(owner.get("uid") == owner_uid and owner.get("controller") for owner in owners)
    if not is_ours or not names.get(labels.REVISION):
        return None
    if not (names.get(labels.SLOT, "").isdigit() and names.get(labels.RANK, "").isdigit()):
        return None
    return names[labels.REVISION], int(names[labels.SLOT])


def _read_group(revision: str, slot: int, pods: list[Json], now: datetime) -> Group:
    notes: Mapping[str, str] = pods[0]["metadata"].get("annotations") or {}
    present = {rank_of(pod) for pod in pods}
    missing = tuple(sorted(set(range(_number(notes.get(labels.GROUP_SIZE), 1))) - present))
    since = notes.get(labels.DRAINING_SINCE)
    standing = _standing(pods, missing=missing, is_draining=bool(since))
    if standing is Standing.STARTING and _is_half_placed(pods, now):
        standing = Standing.LOST
    failed_at = _failed_at(pods, now) if standing is Standing.FAILED else None
    restarts = _number(notes.get(labels.RESTARTS), 0)
    if failed_at and _ran_long(pods[0]):
        restarts = 0
    size = len(pods) + len(missing)
    is_given_up = bool(failed_at) and size > 1 and restarts >= MOST_GROUP_RESTARTS
    cause = _cause(pods, notes, standing)
    return Group(
        replica=Replica(
            slot,
            revision,
            standing,
            restarts=restarts,
            failed_at=failed_at,
            is_given_up=is_given_up,
            unplaced_since=_unplaced_since(pods) if standing is Standing.STARTING else None,
            born=born_revision(pods[0]["metadata"]["name"]) if labels.SWAPPED in notes else "",
            is_unsure=labels.SWAPPING in notes,
        ),
        pods=tuple(pods),
        missing_ranks=missing,
        draining_since=parse_rfc3339(since) if since else None,
        cause=_given_up(cause) if is_given_up else cause,
    )


def left_to_place_s(group: Group, *, now: datetime) -> float | None:
    """Return how long the rest of a half placed group may still look for a place."""
    since = _half_placed_since(list(group.pods))
    if since is None or group.standing is not Standing.STARTING:
        return None
    return max(0.0, (since + _HALF_PLACED_FOR - now).total_seconds())


def _given_up(cause: Cause | None) -> Cause:
    why = cause or Cause(Reason.RUNTIME_CRASHED, "A pod of the group ended.")
    return Cause(
        why.reason,
        f"{why.message} The group was restarted {MOST_GROUP_RESTARTS} times in a row and is not "
        "tried again. Change the spec, or delete the failed pods to have it tried anew.",
    )


def _is_half_placed(pods: list[Json], now: datetime) -> bool:
    since = _half_placed_since(pods)
    return since is not None and now - since >= _HALF_PLACED_FOR


def _half_placed_since(pods: list[Json]) -> datetime | None:
    """Return since when only a part of the group has a place; None where all or nothing has."""
    is_split = any(pod.get("spec", {}).get("nodeName") for pod in pods)
    return _unplaced_since(pods) if is_split else None


def _standing(pods: list[Json], *, missing: tuple[int, ...], is_draining: bool) -> Standing:
    leaving = sum(map(is_leaving, pods))
    has_started = _has_started(pods[0])
    if leaving:
        # A group lives and dies together: the rest of a half deleted one has to go as well.
        return Standing.LEAVING if leaving == len(pods) else Standing.LOST
    if missing and (rank_of(pods[0]) != 0 or has_started):
        return Standing.LOST
    if is_draining:
        return Standing.DRAINING
    if _has_old_weights(pods[0]):
        return Standing.LOST
    if any(pod["status"].get("phase") in ("Failed", "Succeeded") for pod in pods):
        return Standing.FAILED
    if not has_started:
        return Standing.STARTING
    is_ready = condition_of(pods[0], "Ready") == "True"
    is_open = condition_of(pods[0], labels.IN_SERVICE_GATE) == "True"
    return Standing.IN_SERVICE if is_ready and is_open else Standing.UNREADY


def _cause(pods: list[Json], notes: Mapping[str, str], standing: Standing) -> Cause | None:
    """Return the first cause by rank; of a replica that only just began, its predecessor's."""
    if standing not in (Standing.STARTING, Standing.UNREADY, Standing.FAILED):
        return None
    causes = [cause for pod in pods if (cause := pod_cause(pod))]
    # What a rank died of says more than that the others lost it.
    for cause in sorted(causes, key=lambda cause: cause.reason is Reason.RANK_LOST):
        return cause
    try:
        note = json.loads(notes.get(labels.LAST_FAILURE, ""))
        reason = reason_or(note["reason"], Reason.RUNTIME_CRASHED)
        return Cause(reason, str(note["message"]), needs_change=False)
    except (ValueError, KeyError, TypeError):
        return None


def _failed_at(pods: list[Json], now: datetime) -> datetime:
    """Return when the group failed; a pod that does not say counts as failed when it was made."""
    ends = [
        state["terminated"]["finishedAt"]
        for pod in pods
        for container in pod["status"].get("containerStatuses", [])
        if (state := container.get("state", {})).get("terminated", {}).get("finishedAt")
    ]
    if ends:
        return max(map(parse_rfc3339, ends))
    created = pods[0]["metadata"].get("creationTimestamp")
    return parse_rfc3339(created) if created else now


def restarts_of(pod: Json) -> int:
    """Return how often its containers have restarted."""
    return sum(c.get("restartCount", 0) for c in pod["status"].get("containerStatuses") or [])


def _has_old_weights(leader: Json) -> bool:
    """Whether it restarted after its weights were swapped: a restart brings the old ones back."""
    noted = (leader["metadata"].get("annotations") or {}).get(labels.SWAPPED)
    return noted is not None and noted != str(restarts_of(leader))


def _unplaced_since(pods: list[Json]) -> datetime | None:
    """Return since when the scheduler finds no place for one of the pods."""
    refusals = [
        parse_rfc3339(condition["lastTransitionTime"])
        for pod in pods
        if (condition := _condition(pod, "PodScheduled")) is not None
        and condition.get("status") == "False"
        and condition.get("reason") == "Unschedulable"
        and condition.get("lastTransitionTime")
    ]
    return min(refusals, default=None)


def _has_started(leader: Json) -> bool:
    """Whether the weights are loaded: from then on there may be requests in flight."""
    statuses = leader["status"].get("containerStatuses") or []
    return bool(statuses) and all(container.get("started") for container in statuses)


def _ran_long(leader: Json) -> bool:
    ends = [
        container.get("state", {}).get("terminated") or {}
        for container in leader["status"].get("containerStatuses") or []
    ]
    return any(
        parse_rfc3339(end["finishedAt"]) - parse_rfc3339(end["startedAt"]) >= _FORGIVEN_AFTER
        for end in ends
        if end.get("finishedAt") and end.get("startedAt")
    )


def _condition(pod: Json, type_: str) -> Json | None:
    for condition in pod["status"].get("conditions") or []:
        if condition.get("type") == type_:
            found: Json = condition
            return found
    return None


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdigit() else default
