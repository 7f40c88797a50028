"""A deployment's resource, pods and figures become what `decide` looks at. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime

from mizzen.operator.controllers.llmdeployment_replicas import Group
from mizzen.operator.crds.common import Json
from mizzen.operator.desired import labels
from mizzen.operator.engine.key import Key
from mizzen.operator.facts import Facts
from mizzen.operator.metrics.figures import Measured, Target
from mizzen.operator.planning.rollout import COUNTS, Standing
from mizzen.operator.planning.scale_rules import Slo
from mizzen.operator.planning.signals import Observation, ReplicaState, Wake
from mizzen.operator.routing import ref_of
from mizzen.operator.status.conditions import parse_rfc3339

# A replica this long in service has been scraped, whatever the interval.
_SETTLED_S = 60.0
_WAKE = re.compile(r";held=([0-9]{1,9})$")


def find_scaled(key: Key, facts: Facts) -> Json | None:
    """Return the resource where it scales, None where its size is fixed or it is gone."""
    resource = facts.store.get(ref_of(key))
    if resource is None or "deletionTimestamp" in resource["metadata"]:
        return None
    return resource if (resource.get("spec") or {}).get("scaling") else None


def wake_of(resource: Json) -> Wake:
    """Return the gateways' wish: the annotation holds TIME;held=N."""
    text = str((resource["metadata"].get("annotations") or {}).get(labels.WAKE) or "")
    found = _WAKE.search(text)  # anybody may have written it
    return Wake(token=text[:128], held=int(found[1]) if found else 0)


def target_of(key: Key, groups: Iterable[Group], slo: Slo, *, now: datetime) -> Target:
    """Return what the metrics source needs to know of the deployment."""
    serving = [group for group in groups if group.standing is Standing.IN_SERVICE]
    return Target(
        name=(key.namespace, key.name),
        settled=sum(_served_s(group, now) >= _SETTLED_S for group in serving),
        addresses=tuple(group.address for group in serving if group.address),
        slo=slo,
    )


def observation_of(
    resource: Json, groups: Sequence[Group], measured: Measured, *, now: datetime
) -> Observation:
    """Return the look at one deployment."""
    return Observation(
        now_s=now.timestamp(),
        replicas=tuple(_replica(group, now) for group in groups if group.standing in COUNTS),
        traffic=measured.traffic,
        engines=measured.engines,
        wake=wake_of(resource),
    )


def _replica(group: Group, now: datetime) -> ReplicaState:
    leader = group.pods[0]
    created = _created(leader)
    loaded = _loaded_at(leader)
    return ReplicaState(
        name=leader["metadata"]["name"],
        age_s=(now - created).total_seconds() if created else 0.0,
        is_ready=group.standing is Standing.IN_SERVICE,
        start_s=max(0.0, (loaded - created).total_seconds()) if created and loaded else None,
    )


def _served_s(group: Group, now: datetime) -> float:
    loaded = _loaded_at(group.pods[0])
    return (now - loaded).total_seconds() if loaded else 0.0


def _created(pod: Json) -> datetime | None:
    text = pod["metadata"].get("creationTimestamp")
    return parse_rfc3339(text) if text else None


def _loaded_at(pod: Json) -> datetime | None:
    """Return when the runtime became ready, None while it is not.

    The pod's own Ready would not do: it falls and rises with the gate.
    """
    for condition in pod["status"].get("conditions") or []:
        if condition.get("type") == "ContainersReady" and condition.get("status") == "True":
            return parse_rfc3339(condition["lastTransitionTime"])
    return None
