"""How the operator bears a thousand deployments: the table of its published figures.

    python -m benchmarks.operator_scale [--count 1000] [--nodes 2] [--rows pods,mizzen]

Each row gets a control plane of its own: etcd, API server, controllers, scheduler and kwok with
250 nodes of 8 nvidia.com/gpu, on this machine, beside what is measured. Writes are those that the
API server counted (POST, PUT, PATCH, apply, DELETE that succeeded), without Events and Leases.
A simulated pod runs a second after it got its node, as no kubelet is faster: pods that run at once
would be told of changes made right after their creation by one more write.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.control_plane import NAMESPACE, Api, Json, control_plane, settle
from benchmarks.operator_process import LIMIT_S, Operator
from hack.cluster.api_only import ApiCluster
from mizzen.operator.kube.transport import MERGE

GPU = "nvidia.com/gpu"
NODES, GPUS_PER_NODE = 250, 8
IN_FLIGHT = 20
CHANGES = 100


@dataclass
class Row:
    """One line of the table."""

    name: str
    created_s: float = 0.0
    pods_ready_s: float = 0.0
    ready_s: float | None = None
    writes: float = 0.0
    by_kind: Counter[str] = field(default_factory=Counter)
    cpu_s: Counter[str] = field(default_factory=Counter)
    own_writes: float | None = None
    idle_mib: float | None = None
    memory_mib: float | None = None
    change_ms: list[float] = field(default_factory=list)
    restart_s: float | None = None
    restart_writes: int | None = None


def fleet() -> AbstractAsyncContextManager[tuple[ApiCluster, Api]]:
    return control_plane(nodes=NODES, gpus=GPUS_PER_NODE)


def cpu_seconds() -> Counter[str]:
    """Return the processor time that every process of this run has used so far, by name."""
    used: Counter[str] = Counter()
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            name = "operator" if words[-1:] == ["operator"] else Path(words[0]).name
            times = process.cpu_times()
            used["this script" if process == this else name] += times.user + times.system
    return used


class Count:
    """Names that reached a state, and when the last of them did."""

    def __init__(self, wanted: int, has_reached: Callable[[Json], bool]) -> None:
        self.wanted = wanted
        self.has_reached = has_reached
        self.names: set[str] = set()
        self.complete = asyncio.Event()
        self.at = 0.0

    def see(self, kind: str, document: Json) -> None:
        if kind != "DELETED" and self.has_reached(document):
            self.names.add(document["metadata"]["name"])
            if len(self.names) >= self.wanted and not self.complete.is_set():
                self.at = time.monotonic()
                self.complete.set()


def is_ready(document: Json) -> bool:
    conditions = (document.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def is_available(document: Json) -> bool:
    wanted = document["spec"]["replicas"]
    return bool((document.get("status") or {}).get("availableReplicas", 0) >= wanted)


async def fill(
    api: Api, row: Row, path: str, build: Callable[[str], Json], count: int, pods: int,
    is_done: Callable[[Json], bool] | None,
) -> None:  # fmt: skip
    """Create `count` resources and note when they, and their pods, are ready."""
    counts = [(f"/api/v1/namespaces/{NAMESPACE}/pods", Count(count * pods, is_ready))]
    if is_done is not None:
        counts.append((path, Count(count, is_done)))
    watches = [asyncio.create_task(api.watch(where, what.see)) for where, what in counts]
    await asyncio.sleep(0.5)
    before, cpu, started = await api.writes(), cpu_seconds(), time.monotonic()
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def create(number: int) -> None:
        async with slots:
            await api.create(path, build(f"m{number:04}"))

    await asyncio.gather(*(create(number) for number in range(count)))
    row.created_s = time.monotonic() - started
    for _, what in counts:
        await asyncio.wait_for(what.complete.wait(), LIMIT_S)
    row.pods_ready_s = counts[0][1].at - started
    row.ready_s = counts[1][1].at - started if is_done is not None else None
    row.cpu_s = cpu_seconds() - cpu
    row.by_kind = await settle(api) - before
    row.writes = row.by_kind.total() / count
    for watch in watches:
        watch.cancel()


def pod_spec() -> Json:
    return {
        "containers": [
            {"name": "runtime", "image": "none", "resources": {"limits": {GPU: "1"}}},
        ]
    }


async def measure_pods(count: int, nodes: int) -> Row:
    row = Row("bare pods (the floor)")

    def build(name: str) -> Json:
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod_spec()}

    async with fleet() as (_, api):
        path = f"/api/v1/namespaces/{NAMESPACE}/pods"
        await fill(api, row, path, build, count * nodes, 1, None)
    row.writes *= nodes
    return row


async def measure_deployments(count: int, nodes: int) -> Row:
    row = Row("Deployments (built in)")

    def build(name: str) -> Json:
        labels = {"app": name}
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": {
                "replicas": nodes,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod_spec()},
            },
        }

    async with fleet() as (_, api):
        path = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"
        await fill(api, row, path, build, count, nodes, is_available)
    # Ours: creating the resource; the scheduler's and kwok's: one per pod each.
    row.own_writes = row.writes - 1 - 2 * nodes
    return row


def reconciles(metrics: dict[str, float]) -> float:
    return sum(v for n, v in metrics.items() if n.startswith("controller_runtime_reconcile_total"))


async def measure_mizzen(count: int, nodes: int, log: Path) -> Row:
    row = Row("Mizzen" if nodes == 1 else f"Mizzen, groups of {nodes} pods")

    def build(name: str) -> Json:
        return {
            "apiVersion": "mizzen.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": name},
            "spec": {
                "model": {"source": f"file:///models/{name}"},
                "accelerator": {"resource": GPU, "count": 1},
                "parallelism": {"tensor": nodes, "nodes": nodes},
                # A group needs a runtime that joins its ranks over pods; nothing runs here.
                "engine": {"image": "runtime"},
            },
        }

    async with fleet() as (cluster, api):
        operator = Operator(cluster, log)
        await operator.start()
        try:
            await operator.wait_for(lambda m: m.get("leader_election_master_status") == 1)
            await asyncio.sleep(5)
            row.idle_mib = operator.memory_mib()
            path = f"/apis/mizzen.dev/v1alpha1/namespaces/{NAMESPACE}/llmdeployments"
            await fill(api, row, path, build, count, nodes, is_ready)
            row.own_writes = await operator.writes() / count
            row.memory_mib = operator.memory_mib()
            row.change_ms = await measure_changes(api, path, min(CHANGES, count))
            await settle(api)
            row.memory_mib = max(row.memory_mib, operator.memory_mib())
            await operator.stop()
            before, started = await settle(api), time.monotonic()
            await operator.start()
            await operator.wait_for(lambda m: reconciles(m) >= count and m["workqueue_depth"] == 0)
            row.restart_s = time.monotonic() - started
            row.restart_writes = (await settle(api, quiet_s=15) - before).total()
        finally:
            await operator.stop()
    return row


async def measure_changes(api: Api, path: str, changes: int) -> list[float]:
    """Return how many ms after a change of its spec each resource's first child was made."""
    made: dict[str, asyncio.Future[float]] = {}

    def see(kind: str, child: Json) -> None:
        owner = (child["metadata"].get("labels") or {}).get("mizzen.dev/deployment")
        if kind == "ADDED" and owner in made and not made[owner].done():
            made[owner].set_result(time.monotonic())

    # A second replica brings a disruption budget, then a pod.
    kinds = ("/api/v1/namespaces/{}/pods", "/apis/policy/v1/namespaces/{}/poddisruptionbudgets")
    watches = [asyncio.create_task(api.watch(kind.format(NAMESPACE), see)) for kind in kinds]
    await asyncio.sleep(1)
    times = []
    for number in range(changes):
        name = f"m{number:04}"
        made[name] = asyncio.get_running_loop().create_future()
        await api.http.request(
            "PATCH", f"{path}/{name}", body={"spec": {"replicas": 2}}, content_type=MERGE
        )
        changed = time.monotonic()
        times.append(max(0.0, await asyncio.wait_for(made[name], 60) - changed) * 1000)
        await asyncio.sleep(0.2)
    for watch in watches:
        watch.cancel()
    return times


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def line(row: Row) -> str:
    own = "-" if row.own_writes is None else f"{row.own_writes:.1f}"
    memory = (
        "-" if row.memory_mib is None else f"{row.memory_mib:.0f} ({row.idle_mib:.0f} idle) MiB"
    )
    change = "-"
    if row.change_ms:
        cuts = statistics.quantiles(row.change_ms, n=100, method="inclusive")
        change = f"{cuts[49]:.0f} / {cuts[98]:.0f} ms"
    restart = "-" if row.restart_s is None else f"{row.restart_s:.1f} s, {row.restart_writes:.0f}"
    cells = (
        row.name, seconds(row.created_s), seconds(row.pods_ready_s), seconds(row.ready_s),
        f"{own} / {row.writes:.1f}", memory, change, restart,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=1, help="pods per replica")
    parser.add_argument("--rows", default="pods,deployments,mizzen")
    parser.add_argument("--log", type=Path, default=Path("/tmp/operator-scale.log"))
    options = parser.parse_args()
    measures: dict[str, Callable[[], Awaitable[Row]]] = {
        "pods": lambda: measure_pods(options.count, options.nodes),
        "deployments": lambda: measure_deployments(options.count, options.nodes),
        "mizzen": lambda: measure_mizzen(options.count, options.nodes, options.log),
    }
    print(f"{options.count} resources, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| resources | all created | all pods Ready | all resources Ready | writes by the "
        "operator / in all, per resource | memory | change to first write p50 / p99 | "
        "restart: all reconciled, writes |\n|---|---|---|---|---|---|---|---|"
    )
    rows = []
    for name in options.rows.split(","):
        rows.append(await measures[name]())
        print(line(rows[-1]), flush=True)
    for row in rows:
        kinds = (f"{what} {n / options.count:.2f}" for what, n in row.by_kind.most_common(14))
        print(f"\n{row.name}, writes per resource: {', '.join(kinds)}")
        used = (f"{name} {s * 1000 / options.count:.0f}" for name, s in row.cpu_s.most_common())
        print(f"{row.name}, ms of processor time per resource until Ready: {', '.join(used)}")


if __name__ == "__main__":
    asyncio.run(main())
