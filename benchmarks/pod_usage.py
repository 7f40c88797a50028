"""CPU time and memory of the operator's and the gateways' pods, as the kubelets count them.

https://kubernetes.io/docs/reference/instrumentation/node-metrics/
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import astuple, dataclass
from typing import Any

from benchmarks.deployment import Deployment

SYSTEM = "mizzen-system"
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one pod has used so far, and holds now."""

    cpu_s: float
    memory_mib: float  # resident, without the page cache


@dataclass(frozen=True, slots=True)
class Usage:
    """What one pod used between two moments."""

    pod: str
    cpu_s: float
    cores: float  # on average
    mib_before: float
    mib_after: float

    @classmethod
    def between(cls, pod: str, before: Snapshot, after: Snapshot, seconds: float) -> Usage:
        cpu_s = after.cpu_s - before.cpu_s
        return cls(
            *(pod, round(cpu_s, 1), round(cpu_s / seconds, 3)),
            *(round(before.memory_mib), round(after.memory_mib)),
        )


async def system_usage(cluster: Deployment) -> dict[str, Snapshot]:
    """Return what each pod of the chart has used, by its name."""
    found: dict[str, Snapshot] = {}
    for node in (await cluster.get("nodes"))["items"]:
        path = f"/api/v1/nodes/{node['metadata']['name']}/proxy/stats/summary"
        found.update(snapshots(json.loads(await cluster.kubectl("get", "--raw", path))))
    return found


def snapshots(summary: Json) -> Iterator[tuple[str, Snapshot]]:
    """Return the chart's pods in a kubelet's summary."""
    for pod in summary["pods"]:
        if pod["podRef"]["namespace"] == SYSTEM:
            cpu_s = pod["cpu"]["usageCoreNanoSeconds"] / 1e9
            yield pod["podRef"]["name"], Snapshot(cpu_s, pod["memory"]["rssBytes"] / 2**20)


def as_usage_table(usage: Collection[Usage]) -> str:
    """Return what the pods used as a Markdown table."""
    rows = [f"| {' | '.join(map(str, astuple(one)))} |" for one in usage]
    head = (
        "| Pod | CPU seconds | cores on average | MiB before | MiB after |\n|---|---|---|---|---|"
    )
    return "\n".join([head, *rows])
