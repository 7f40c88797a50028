"""Replicas leave under a load of streams, and none is cut: real gateway, real runtimes.

The API server is played: it says of the endpoints what a cluster's would, and no earlier.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from aiohttp import web

from benchmarks.cut_streams import Row, as_table, measure
from benchmarks.stream_counter import CUT, WHOLE, StreamCounter
from hack.ports import free_port
from hack.tiny_model import write_tiny_model
from mizzen.operator.planning.drain import SETTLE_S

# As long as a cluster takes to tell everybody that an endpoint is not ready any more.
PROPAGATION_S = 1.0
TOKENS = 150
Json = dict[str, Any]


@dataclass
class Replica:
    """A runtime process on an address of its own, as a pod has one."""

    address: str
    port: int
    admin_port: int
    process: asyncio.subprocess.Process
    conditions: Json = field(default_factory=lambda: {"ready": False})

    async def admin(self, method: str, path: str) -> httpx.Response:
        async with httpx.AsyncClient(timeout=300) as client:
            return await client.request(method, f"http://{self.address}:{self.admin_port}{path}")

    async def in_flight(self) -> int:
        return int((await self.admin("GET", "/drain")).json()["inFlight"])


class Cluster:
    """An API server that serves one deployment and its endpoints, and the replicas behind them."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self.replicas: list[Replica] = []
        self._port, self._admin_port = free_port(), free_port()
        self._made = 1
        self._version = 1
        self._watches: list[asyncio.Queue[Json]] = []

    async def add(self) -> Replica:
        """Start a replica and put it into service when it is ready."""
        self._made += 1
        address = f"127.0.0.{self._made}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mizzen.cli", "serve", str(self._model), f"--host={address}"),
            *(f"--port={self._port}", f"--admin-port={self._admin_port}"),
            *(f"--grpc-port={free_port()}", "--device=cpu", "--dtype=float32"),
            *("--kv-cache-gib=0.1", "--drain-seconds=120"),
        )
        replica = Replica(address, self._port, self._admin_port, process)
        self.replicas.append(replica)
        while True:
            try:
                if (await replica.admin("GET", "/readyz")).status_code == 200:
                    break
            except httpx.TransportError:
                assert process.returncode is None
            await asyncio.sleep(0.1)
        self.tell(replica, ready=True, serving=True)
        return replica

    async def busy(self) -> Replica:
        """Wait until a replica has streams in flight; return it."""
        while True:
            for replica in self.replicas:
                if await replica.in_flight():
                    return replica
            await asyncio.sleep(0.02)

    def tell(self, replica: Replica, **conditions: bool) -> None:
        """Have the endpoint's state reach those who watch."""
        replica.conditions = conditions
        self._version += 1
        for watch in self._watches:
            watch.put_nowait({"type": "MODIFIED", "object": self._slice()})

    def forget(self, replica: Replica) -> None:
        self.replicas.remove(replica)
        self.tell(replica, ready=False)

    def _slice(self) -> Json:
        return {
            "metadata": {
                "name": "tiny-1",
                "namespace": "team",
                "labels": {"mizzen.dev/deployment": "tiny"},
                "resourceVersion": str(self._version),
            },
            "ports": [{"name": "http", "port": self._port}],
            "endpoints": [
                {"addresses": [r.address], "conditions": r.conditions} for r in self.replicas
            ],
        }

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a list or a watch of either kind."""
        is_slices = "endpointslices" in request.path
        if "watch" in request.query:
            return await self._watch(request, is_slices=is_slices)
        model = {"metadata": {"name": "tiny", "namespace": "team", "resourceVersion": "1"}}
        items = [self._slice() if is_slices else model]
        metadata = {"resourceVersion": str(self._version)}
        return web.json_response({"metadata": metadata, "items": items})

    async def _watch(self, request: web.BaseRequest, *, is_slices: bool) -> web.StreamResponse:
        changes: asyncio.Queue[Json] = asyncio.Queue()
        if is_slices:
            self._watches.append(changes)
            changes.put_nowait({"type": "MODIFIED", "object": self._slice()})
        answer = web.StreamResponse()
        await answer.prepare(request)
        with suppress(ConnectionResetError):
            while True:
                await answer.write(json.dumps(await changes.get()).encode() + b"\n")
        return answer


@asynccontextmanager
async def cluster_with_gateway(folder: Path) -> AsyncIterator[tuple[Cluster, str]]:
    """Yield a cluster without replicas and the address of a gateway process that watches it."""
    cluster = Cluster(write_tiny_model(folder / "tiny"))
    runner = web.ServerRunner(web.Server(cluster.answer), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    gateway = None
    try:
        gateway = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mizzen.cli", "gateway", "--host", "127.0.0.1"),
            *("--port", "0", "--metrics-port", "0", "--auth", "off", "--hold-timeout-s", "1200"),
            *("--kubeconfig", str(_kubeconfig(folder, runner.addresses[0][1]))),
            stderr=asyncio.subprocess.PIPE,
        )
        assert gateway.stderr is not None
        async for line in gateway.stderr:
            if found := re.search(rb"listens on \S+:(\d+)", line):
                break
        reading = asyncio.create_task(gateway.stderr.read())  # so that its pipe never fills
        yield cluster, f"http://127.0.0.1:{int(found[1])}"
        reading.cancel()
    finally:
        for process in [gateway, *(replica.process for replica in cluster.replicas)]:
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()
        await runner.cleanup()


def _kubeconfig(folder: Path, port: int) -> Path:
    """Write how to reach the API server that is played."""
    path = folder / "kubeconfig"
    named = {"name": "it", "cluster": {"server": f"http://127.0.0.1:{port}"}}
    context = {"name": "it", "context": {"cluster": "it", "user": "it"}}
    document = {
        **{"apiVersion": "v1", "kind": "Config", "current-context": "it"},
        **{"clusters": [named], "contexts": [context], "users": [{"name": "it", "user": {}}]},
    }
    path.write_text(yaml.safe_dump(document))
    return path


async def scale_down(cluster: Cluster, replica: Replica) -> None:
    """Take a replica away as the operator does: out of service, drained, deleted."""
    await asyncio.sleep(PROPAGATION_S / 2)  # the gate closes, and soon everybody knows
    cluster.tell(replica, ready=False, serving=True)
    await replica.admin("POST", "/drain")
    await asyncio.sleep(SETTLE_S)
    while await replica.in_flight():  # noqa: ASYNC110 - it is another process
        await asyncio.sleep(0.1)
    await delete(cluster, replica)


async def delete(cluster: Cluster, replica: Replica) -> None:
    """End the process as a kubelet does, and let the endpoints follow as quickly as they do.

    `kubectl delete pod` and a node drain are no more than this: nothing is prepared.
    """
    replica.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(PROPAGATION_S)
    cluster.tell(replica, ready=False, serving=True, terminating=True)
    assert await replica.process.wait() == 0
    cluster.forget(replica)


# Four processes are started; a busy machine takes its time with each.
@pytest.mark.timeout(1800)
async def test_no_departure_under_load_cuts_a_stream_but_a_kill_does(tmp_path: Path) -> None:
    async with cluster_with_gateway(tmp_path) as (cluster, url):
        await asyncio.gather(cluster.add(), cluster.add())
        counter = StreamCounter(url, "tiny", max_tokens=TOKENS)
        async with counter.load(streams=4):
            await scale_down(cluster, await cluster.busy())
            # The only one left is deleted: its streams end, and later ones wait for the next.
            await asyncio.gather(delete(cluster, await cluster.busy()), cluster.add())
        assert counter.errors == []
        assert counter.ends[WHOLE] > 8

        control = StreamCounter(url, "tiny", max_tokens=10 * TOKENS)
        async with control.load(streams=2):
            while not control.begun:  # noqa: ASYNC110 - the counter has no event to wait for
                await asyncio.sleep(0.01)
            (await cluster.busy()).process.kill()
        assert control.ends[CUT] > 0


async def test_the_table_tells_the_kinds_of_departure_apart_and_sums_them_up() -> None:
    ends: Counter[str] = Counter()
    open_streams: list[int] = []

    async def depart() -> None:
        ends.update([WHOLE, WHOLE, CUT])
        open_streams.extend([2, 0])

    async def row(name: str, times: int) -> Row:
        return await measure(
            name, times, depart, at_once=2, ends=ends.copy, open_streams=open_streams
        )

    rows = [await row("scale-downs", 4), await row("rollouts", 1)]
    lines = [line.split("|")[1:9] for line in as_table(rows).splitlines()]
    assert [[cell.strip() for cell in line] for line in lines[2:]] == [
        ["scale-downs", "4", "4", "2", "4", "4", "0", "2"],
        ["rollouts", "2", "2", "1", "2", "2", "0", "1"],
        ["all", "6", "6", "3", "6", "6", "0", "3"],
    ]


async def test_none_departs_after_the_deadline() -> None:
    async def depart() -> None:
        raise AssertionError("it is too late")

    row = await measure(
        *("scale-downs", 3, depart), at_once=1, ends=Counter, open_streams=[], deadline=-math.inf
    )
    assert (row.times, row.pods, row.cut) == (0, 0, 0)
