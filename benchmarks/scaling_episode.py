"""A deployment through a busy day in a few minutes, told by its own status.

    python -m benchmarks.scaling_episode

A rise, an outage of all metrics, the way down, zero, and a wake: every change of `status.scaling`
is printed with its time, at the end what `kubectl describe` says. The operator is a real process
with its own settings and reads a real Prometheus (Debian's package); nodes and replicas are
simulated, as `simulated_replicas` describes. Takes about eleven minutes, most of it the five
minutes in which less must be needed before anything is taken away.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from benchmarks.control_plane import NAMESPACE, Api, beside, control_plane
from benchmarks.operator_process import LIMIT_S, Operator
from benchmarks.simulated_replicas import Fleet, scrape_configuration
from hack.cluster.api_only import ApiCluster
from hack.prometheus import PrometheusServer, prometheus_binary
from mizzen.operator.desired.labels import DEPLOYMENT
from mizzen.operator.kube.transport import MERGE
from mizzen.runtime.gateway.wake import Waker

Json = dict[str, Any]
NAME = "chat"
COLLECTION = f"/apis/mizzen.dev/v1alpha1/namespaces/{NAMESPACE}/llmdeployments"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
SCRAPE_S = 5
TICK_S = 0.25
BUSY, QUIET = 7.0, 1.0  # requests per second
SPEC: Json = {
    "model": {"source": "file:///models/chat"},
    "accelerator": {"resource": "nvidia.com/gpu", "count": 1},
    "engine": {"image": "runtime"},
    "drain": {"maxSeconds": 5},  # no process behind the pods could say that it is done
    "scaling": {
        **{"min": 0, "max": 6, "slo": {"itlMs": 120}},
        "idle": {"toZeroAfterSeconds": 30},
    },
}


class Patches:
    """The API server as the gateway's waker sees it."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def merge(self, path: str, patch: Json) -> object:
        return await self._api.http.request("PATCH", path, body=patch, content_type=MERGE)


class Episode:
    """The deployment's story so far."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.status: Json = {}
        self._pods: dict[str, Json] = {}
        self._told: tuple[object, ...] = ()
        self._begun_at = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun_at:6.1f} s  {text}", flush=True)

    def see_resource(self, kind: str, document: Json) -> None:
        """Take an event of the deployments' watch; tell what is news."""
        self.status = document.get("status", {})
        if told := account(self.status):
            if told != self._told:
                self.say("  ".join(told))
            self._told = told

    def see_pod(self, kind: str, document: Json) -> None:
        """Take an event of the pods' watch; the fleet follows."""
        name = document["metadata"]["name"]
        if kind == "DELETED":
            self._pods.pop(name, None)
        elif document["metadata"].get("labels", {}).get(DEPLOYMENT) == NAME:
            self._pods[name] = document
        self.fleet.set_pods({name for name, pod in self._pods.items() if is_in_service(pod)})

    @property
    def is_at_zero(self) -> bool:
        """Whether nothing runs and nothing is wanted."""
        return not self._pods and self.desired == 0

    @property
    def desired(self) -> int | None:
        """How many replicas are wanted, None before the first look."""
        found: int | None = self.status.get("scaling", {}).get("desired")
        return found

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(2 * LIMIT_S):
            while not is_so():  # noqa: ASYNC110 - two watches tell
                await asyncio.sleep(TICK_S)


def account(status: Json) -> tuple[str, ...]:
    """Return what a status says of the size, without the figures that change all the time."""
    scaling = status.get("scaling")
    if not scaling:
        return ()
    return (
        f"{status.get('ready', '-')} ready, {scaling['desired']} wanted",
        scaling["state"],
        scaling["reason"],
    )


def is_in_service(pod: Json) -> bool:
    """Whether a pod takes requests."""
    conditions = pod.get("status", {}).get("conditions", [])
    is_ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return is_ready and "deletionTimestamp" not in pod["metadata"]


async def play(episode: Episode) -> None:
    """Let the load rise and fall, and the metrics go."""
    fleet, say = episode.fleet, episode.say
    say(f"-- {QUIET:g} request per second")
    fleet.requests_per_s = QUIET
    await episode.until(lambda: len(fleet.replicas) == 1)
    await asyncio.sleep(45)
    say(f"-- {BUSY:g} requests per second")
    fleet.requests_per_s = BUSY
    await asyncio.sleep(75)
    say("-- no process tells its metrics any more")
    fleet.is_observable = False
    await asyncio.sleep(30)
    say(f"-- the metrics are back; {QUIET:g} request per second")
    fleet.is_observable = True
    fleet.requests_per_s = QUIET
    await episode.until(lambda: episode.desired == 1)
    await asyncio.sleep(5)
    say("-- nobody asks any more")
    fleet.requests_per_s = 0.0
    await episode.until(lambda: episode.is_at_zero)
    say("-- three requests arrive, and are held")
    for _ in range(3):
        fleet.ask()
    await episode.until(lambda: len(fleet.replicas) == 1)
    await asyncio.sleep(10)


async def keep_working(fleet: Fleet, api: Api) -> None:
    """Have requests arrive and be computed, and those that are held ask for a replica."""
    waker = Waker(Patches(api))
    while True:
        fleet.work()
        if fleet.held:
            waker.wake(fleet.model.key, fleet.held)
        await asyncio.sleep(TICK_S)


@asynccontextmanager
async def prometheus(fleet: Fleet, folder: Path) -> AsyncIterator[str]:
    """Yield the address of a Prometheus that scrapes the fleet."""
    runner = web.ServerRunner(web.Server(fleet.answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    configuration = scrape_configuration(f"127.0.0.1:{runner.addresses[0][1]}", every_s=SCRAPE_S)
    server = PrometheusServer(prometheus_binary(), folder, configuration)
    try:
        yield await asyncio.to_thread(server.__enter__)
    finally:
        await asyncio.to_thread(server.__exit__)
        await runner.cleanup()


async def record(cluster: ApiCluster, api: Api, log: Path) -> None:
    """Run the episode and print what the status said."""
    fleet = Fleet(NAMESPACE, NAME)
    folder = cluster.directory / "prometheus"  # not among the files of etcd
    folder.mkdir()
    async with prometheus(fleet, folder) as url:
        operator = Operator(cluster, log, MIZZEN_PROMETHEUS_URL=url)
        await operator.start()
        episode = Episode(fleet)
        watches = (
            api.watch(COLLECTION, episode.see_resource),
            api.watch(PODS, episode.see_pod),
        )
        try:
            async with beside(*watches, keep_working(fleet, api)):
                document = {"apiVersion": "mizzen.dev/v1alpha1", "kind": "LLMDeployment"}
                await api.create(COLLECTION, document | {"metadata": {"name": NAME}, "spec": SPEC})
                await play(episode)
        finally:
            await operator.stop()
    described = await asyncio.to_thread(cluster.kubectl, "-n", NAMESPACE, "describe", "llmd", NAME)
    print(f"\n$ kubectl describe llmd {NAME}\n{described}")


async def run(log: Path) -> None:
    """Record on a control plane that ends with it."""
    async with control_plane(nodes=2, gpus=8) as (cluster, api):
        await record(cluster, api, log)


def main() -> None:
    """Print the episode and the description."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--log", type=Path, default=Path("/tmp/scaling-episode.log"))
    asyncio.run(run(parser.parse_args().log))


if __name__ == "__main__":
    main()
