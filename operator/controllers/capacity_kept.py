"""What the arbiter keeps of one resource for replicas that deployments may come to want."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from mizzen.operator.controllers.capacity_observe import Node, gang_nodes, is_over
from mizzen.operator.crds.common import Json
from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.operator.desired import labels
from mizzen.operator.planning.lending import reserved_blocks, surge_blocks
from mizzen.operator.planning.placement import Gang
from mizzen.operator.status.conditions import parse_rfc3339

# As long as the autoscaler remembers its load.
_OF_LATE = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Kept:
    """Blocks beside those that replicas hold, the largest first."""

    reserve: tuple[Gang, ...]  # that no job gets
    surge: tuple[Gang, ...]  # and that only jobs get that give them back


def read_kept(
    deployments: Iterable[tuple[Json, LLMDeploymentSpec]],
    pods: Sequence[Json],
    nodes: Mapping[str, Node],
    resource: str,
    *,
    now: datetime,
) -> Kept:
    """Return what is kept of the resource for the deployments that scale."""
    reserve: list[Gang] = []
    surge: list[Gang] = []
    for document, spec in deployments:
        if spec.scaling is None or spec.accelerator.resource != resource:
            continue
        there = sum(_leads(pod, document) and not is_over(pod) for pod in pods)
        patch = spec.pod_template_patch.to_api() if spec.pod_template_patch else {}
        where = gang_nodes(patch.get("nodeSelector") or {}, patch.get("tolerations") or (), nodes)
        gang = Gang(spec.parallelism.nodes, spec.devices_per_pod, where)
        least, most = spec.scaling.reserve, spec.scaling.max
        reserve += reserved_blocks(gang, reserve=least, most=most, there=there)
        of_late = min(most, replicas_of_late(document.get("status") or {}, now=now))
        surge += surge_blocks(gang, of_late=of_late, reserve=least, there=there)
    return Kept(_largest_first(reserve), _largest_first(surge))


def replicas_of_late(status: Json, *, now: datetime) -> int:
    """Return the most replicas the autoscaler wanted at a time within the last hour.

    The status tells its last ten moves, so of more than ten within the hour the first are missing.
    """
    scaling = status.get("scaling") or {}
    counts = [int(scaling.get("desired") or 0)]
    for move in scaling.get("history") or ():
        if now - parse_rfc3339(move["time"]) < _OF_LATE:
            counts += (int(move["before"]), int(move["after"]))
    return max(counts)


def _leads(pod: Json, deployment: Json) -> bool:
    own = pod["metadata"].get("labels") or {}
    return (
        pod["metadata"]["namespace"] == deployment["metadata"]["namespace"]
        and own.get(labels.DEPLOYMENT) == deployment["metadata"]["name"]
        and own.get(labels.RANK) == "0"
    )


def _largest_first(blocks: Iterable[Gang]) -> tuple[Gang, ...]:
    return tuple(sorted(blocks, key=lambda gang: (-gang.devices, -gang.pods)))
