"""A control plane of a benchmark's own, and the API server as benchmarks use it."""

import asyncio
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import ApiClient, Configuration

from benchmarks.operator_process import SYSTEM
from hack.cluster.api_only import ApiCluster
from mizzen.operator.kube.errors import Throttled
from mizzen.operator.kube.transport import HttpTransport

NAMESPACE = "bench"
POD_START_MS = 1000

Json = dict[str, Any]
_WRITE = re.compile(r"apiserver_request_total\{([^}]*)\} (\S+)")
# Neither follows from what is measured: the fleet's heartbeats, and what people are told.
_NOT_COUNTED = ("events", "leases", "nodes", "tokenreviews", "subjectaccessreviews")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Api:
    """The API server as benchmarks use it."""

    def __init__(self, client: ApiClient) -> None:
        self.client = client
        self.http = HttpTransport(client)

    async def create(self, path: str, document: Json) -> Json:
        return await self.http.request("POST", path, body=document)

    async def writes(self) -> Counter[str]:
        """Return how many writes the API server has counted so far, by verb and resource."""
        answer = await self.client.rest_client.request(
            "GET", f"{self.client.configuration.host}/metrics", headers={}
        )
        found: Counter[str] = Counter()
        for labels, value in _WRITE.findall((await answer.read()).decode()):
            seen = dict(_LABEL.findall(labels))
            if (
                seen["verb"] in ("POST", "PUT", "PATCH", "APPLY", "DELETE")
                and seen["code"].startswith("2")
                and seen["resource"] not in _NOT_COUNTED
            ):
                what = "/".join(filter(None, (seen["resource"], seen["subresource"])))
                found[f"{seen['verb']} {what}"] += int(float(value))
        return found

    async def watch(self, path: str, seen: Callable[[str, Json], None]) -> None:
        """Hand every event of a collection to `seen`, until cancelled; again after an end."""
        while True:
            try:
                listing = await self.http.request("GET", path)
            except Throttled:  # as the API server answers for a kind that it learns just now
                await asyncio.sleep(0.5)
                continue
            session = self.client.rest_client.pool_manager
            assert session is not None, "the first request makes it"
            for item in listing["items"]:
                seen("LISTED", item)
            version = listing["metadata"]["resourceVersion"]
            url = f"{self.client.configuration.host}{path}?watch=1&resourceVersion={version}"
            try:
                async with session.get(url, timeout=aiohttp.ClientTimeout(total=None)) as stream:
                    async for line in stream.content:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            break
                        seen(event["type"], event["object"])
            except aiohttp.ClientError as error:
                print(f"a watch broke: {error!r}", file=sys.stderr)


@asynccontextmanager
async def beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have watches and the like go on as long as the block does; an error of one ends it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


@asynccontextmanager
async def control_plane(*, nodes: int, gpus: int) -> AsyncIterator[tuple[ApiCluster, Api]]:
    """Yield a fresh cluster with its fleet of nodes of so many GPUs and our CRDs."""
    # What a benchmark puts beside the cluster's own files goes with them.
    with tempfile.TemporaryDirectory(prefix="mizzen-bench-") as folder:
        cluster = ApiCluster(Path(folder), pod_start_ms=POD_START_MS)
        try:
            await asyncio.to_thread(cluster.start)
            await asyncio.to_thread(_furnish, cluster, nodes, gpus)
            configuration = Configuration()
            await kube_config.load_kube_config(
                config_file=str(cluster.kubeconfig), client_configuration=configuration
            )
            async with ApiClient(configuration) as client:
                api = Api(client)
                await api.create(
                    f"/api/v1/namespaces/{SYSTEM}/secrets",
                    {"metadata": {"name": "mizzen-admin"}, "stringData": {"token": "benchmark"}},
                )
                await settle(api)
                yield cluster, api
        finally:
            await asyncio.to_thread(cluster.stop)


def _furnish(cluster: ApiCluster, nodes: int, gpus: int) -> None:
    cluster.add_nodes(nodes, gpus=gpus)
    for namespace in (NAMESPACE, SYSTEM):
        cluster.create_namespace(namespace)
    cluster.kubectl("apply", "--server-side", "-f", "manifests/crds")


async def settle(api: Api, *, quiet_s: float = 3.0) -> Counter[str]:
    """Wait until nobody writes any more; return the counts of writes."""
    before, since = await api.writes(), time.monotonic()
    while time.monotonic() - since < quiet_s:
        await asyncio.sleep(0.5)
        if (now := await api.writes()) != before:
            before, since = now, time.monotonic()
    return before
