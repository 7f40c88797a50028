"""Milliseconds from a change of a deployment's spec to the operator's first write for it.

    python -m benchmarks.change_to_write [--changes 200]

The operator is a process of its own and idle: a few deployments on a control plane with simulated
nodes, one change at a time, at a random moment after all is as it should be. A time runs from
before the change is sent until a watch tells of the first write that follows it, a child made,
changed or deleted or its own status, so it includes the API server's part in both.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.control_plane import NAMESPACE, Api, beside, control_plane
from benchmarks.operator_process import LIMIT_S, Operator
from benchmarks.rows import Rows, percentile
from hack.cluster.api_only import ApiCluster
from mizzen.operator.desired.labels import DEPLOYMENT
from mizzen.operator.kube.transport import MERGE

Json = dict[str, Any]
GPU = "nvidia.com/gpu"
DEPLOYMENTS = 4
LONGEST_PAUSE_S = 1.0
COLLECTION = f"/apis/mizzen.dev/v1alpha1/namespaces/{NAMESPACE}/llmdeployments"
CHILDREN = {
    "Pod": f"/api/v1/namespaces/{NAMESPACE}/pods",
    "PodDisruptionBudget": f"/apis/policy/v1/namespaces/{NAMESPACE}/poddisruptionbudgets",
    "ControllerRevision": f"/apis/apps/v1/namespaces/{NAMESPACE}/controllerrevisions",
}
# What a change is, by the spec it finds. The size goes up and down, so that it stays small.
CHANGES: dict[str, Callable[[Json], Json]] = {
    "size": lambda spec: {"replicas": 3 - spec["replicas"]},
    "new revision": lambda spec: {"engine": {"maxNumSeqs": 16 - spec["engine"]["maxNumSeqs"]}},
    "status alone": lambda spec: {
        "rollout": {"progressDeadlineSeconds": 7200 - spec["rollout"]["progressDeadlineSeconds"]}
    },
}


@dataclass(frozen=True, slots=True)
class Write:
    """What a watch told of: the version it brought, when that was heard, and of what kind."""

    version: int
    heard_at: float
    what: str


@dataclass(slots=True)
class Fleet:
    """What the watches told of the deployments and their children, by deployment."""

    resources: dict[str, Json] = field(default_factory=dict)
    pods: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    writes: dict[str, list[Write]] = field(default_factory=lambda: defaultdict(list))
    stirred: asyncio.Event = field(default_factory=asyncio.Event)

    def see_resource(self, kind: str, document: Json) -> None:
        """Take an event of the deployments' watch."""
        name = document["metadata"]["name"]
        self.resources[name] = document
        self._note(name, "status", document)

    def see_child(self, what: str, kind: str, document: Json) -> None:
        """Take an event of a watch of one kind of children."""
        name = document["metadata"].get("labels", {}).get(DEPLOYMENT, "")
        if what == "Pod":
            change = self.pods[name].discard if kind == "DELETED" else self.pods[name].add
            change(document["metadata"]["name"])
        self._note(name, what, document)

    def _note(self, name: str, what: str, document: Json) -> None:
        version = int(document["metadata"]["resourceVersion"])
        self.writes[name].append(Write(version, time.monotonic(), what))
        self.stirred.set()

    async def first_write(self, name: str, *, after: int) -> Write:
        """Return what was heard of first that is newer than a version; wait for it."""
        while True:
            self.stirred.clear()
            for write in self.writes[name]:
                if write.version > after:
                    return write
            await self.stirred.wait()

    def is_settled(self) -> bool:
        """Whether every deployment is as its spec says and nobody has anything left to do."""
        return len(self.resources) == DEPLOYMENTS and all(
            is_as_wanted(resource, len(self.pods[name]))
            for name, resource in self.resources.items()
        )


def is_as_wanted(resource: Json, pods: int) -> bool:
    """Whether a deployment has its size, of its newest revision, and its status says so."""
    status, spec = resource.get("status", {}), resource["spec"]
    counts = {status.get(name) for name in ("replicas", "readyReplicas", "updatedReplicas")}
    is_seen = status.get("observedGeneration") == resource["metadata"]["generation"]
    return is_seen and pods == spec["replicas"] and counts == {pods}


def deployment(name: str) -> Json:
    """Return a deployment that makes simulated pods, with all that is changed later."""
    return {
        "apiVersion": "mizzen.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": f"file:///models/{name}"},
            "accelerator": {"resource": GPU, "count": 1},
            "replicas": 1,
            "engine": {"image": "runtime", "maxNumSeqs": 7},
            "rollout": {"progressDeadlineSeconds": 3000},
            "drain": {"maxSeconds": 0},  # no process behind the pods could say that it is done
        },
    }


@asynccontextmanager
async def following(api: Api) -> AsyncIterator[Fleet]:
    """Yield what the watches tell, as long as the block runs."""
    fleet = Fleet()
    watches = [api.watch(COLLECTION, fleet.see_resource)]
    watches += [api.watch(path, partial(fleet.see_child, what)) for what, path in CHILDREN.items()]
    async with beside(*watches):
        yield fleet


async def wait_for_idleness(fleet: Fleet, *, quiet_s: float = 0.5) -> None:
    """Wait until all is as wanted and nothing has changed for a moment."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            fleet.stirred.clear()
            try:
                await asyncio.wait_for(fleet.stirred.wait(), quiet_s)
            except TimeoutError:
                if fleet.is_settled():
                    return


async def change(api: Api, fleet: Fleet, kind: str, name: str) -> tuple[float, str]:
    """Change a deployment; return after how many ms the operator wrote, and what."""
    body = {"spec": CHANGES[kind](fleet.resources[name]["spec"])}
    fleet.writes[name].clear()
    sent_at = time.monotonic()
    changed = await api.http.request("PATCH", f"{COLLECTION}/{name}", body=body, content_type=MERGE)
    version = int(changed["metadata"]["resourceVersion"])
    write = await asyncio.wait_for(fleet.first_write(name, after=version), LIMIT_S)
    return (write.heard_at - sent_at) * 1000, write.what


async def measure(cluster: ApiCluster, api: Api, changes: int, log: Path) -> dict[str, list[Any]]:
    """Return the times and the first writes of so many changes, by kind."""
    found: dict[str, list[Any]] = defaultdict(list)
    operator = Operator(cluster, log)
    await operator.start()
    try:
        await operator.wait_for(lambda m: m.get("leader_election_master_status") == 1)
        async with following(api) as fleet:
            for number in range(DEPLOYMENTS):
                await api.create(COLLECTION, deployment(f"m{number}"))
            for number in range(changes):
                await wait_for_idleness(fleet)
                await asyncio.sleep(random.uniform(0, LONGEST_PAUSE_S))
                kind = list(CHANGES)[number % len(CHANGES)]
                found[kind].append(
                    await change(api, fleet, kind, f"m{random.randrange(DEPLOYMENTS)}")
                )
    finally:
        await operator.stop()
    return found


def row_of(name: str, found: list[tuple[float, str]]) -> dict[str, str | int | float | None]:
    """Return a line of the table."""
    times = [ms for ms, _ in found]
    writes = Counter(what for _, what in found)
    return {
        "change": name,
        "times": len(found),
        **{f"p{rank}_ms": round(percentile(times, rank), 1) for rank in (50, 90, 99)},
        "longest_ms": round(max(times), 1),
        "first_write": ", ".join(f"{what} {n}" for what, n in writes.most_common()),
    }


async def run(options: argparse.Namespace) -> None:
    """Measure on a control plane that ends with it, and print."""
    rows = Rows(
        f"Change of a spec to the first write: {options.changes} changes, idle operator, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    async with control_plane(nodes=2, gpus=8) as (cluster, api):
        found = await measure(cluster, api, options.changes, options.log)
    for kind, each in found.items():
        rows.add(row_of(kind, each))
    rows.add(row_of("all", [one for each in found.values() for one in each]))
    rows.print_table()


def main() -> None:
    """Print a JSON line per kind of change and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--log", type=Path, default=Path("/tmp/change-to-write.log"))
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
