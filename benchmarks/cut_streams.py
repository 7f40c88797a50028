"""How many streams are cut while replicas of real deployments leave under load.

    python -m benchmarks.cut_streams --api-key mz-... [--deployments 5] [--scale-downs 100]
        [--rollouts 20] [--drains 20] [--deletions 20] [--streams 3]

Needs a cluster with the chart and the quickstart's claim with its model (`make demo` leaves both),
and kubectl that reaches them. It makes some deployments of two replicas and has a replica of each
leave at the same time; that counts once per deployment. Scale-downs go from two replicas to one, a
rollout changes an engine setting, a node drain is one `kubectl drain` of all their pods on a node,
and a deletion is `kubectl delete pod`. Clients of each deployment keep streams open from before a
departure until it is over. Of every pod it is told how many streams it had when it began to leave.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, astuple, dataclass

from benchmarks.control_plane import Api, beside
from benchmarks.deployment import LIMIT_S, Deployment, Json, apply, gateway_url
from benchmarks.leaving_pods import LeavingPods
from benchmarks.pod_usage import Usage, as_usage_table, system_usage
from benchmarks.stream_counter import CUT, REFUSED, WHOLE, StreamCounter
from mizzen.operator.kube.connect import open_client


@dataclass(frozen=True, slots=True)
class Row:
    """What happened to the streams while one kind of departure went on."""

    departure: str
    times: int
    pods: int  # that left
    busy_pods: int  # of them, with a stream when they began to leave
    open_streams: int  # on them then
    whole: int
    refused: int
    cut: int
    seconds: float


class Fleet:
    """Deployments of two replicas each, and the clients that stream from them."""

    def __init__(
        self, deployments: Sequence[Deployment], counters: Sequence[StreamCounter]
    ) -> None:
        self.deployments, self.counters = deployments, counters

    def ends(self) -> Counter[str]:
        """How the streams of all clients have ended so far."""
        return sum((counter.ends for counter in self.counters), Counter())

    async def each(self, depart: Callable[[Deployment], Awaitable[None]]) -> None:
        """Have all of them do the same at the same time."""
        await asyncio.gather(*(depart(deployment) for deployment in self.deployments))

    async def under_load(self, streams: int, depart: Awaitable[None]) -> None:
        """Keep so many streams of each deployment open until the departure is over."""
        async with asyncio.TaskGroup() as clients:
            is_over = asyncio.Event()
            begun = [asyncio.Event() for _ in self.counters]
            for counter, has_begun in zip(self.counters, begun, strict=True):
                clients.create_task(_keep_open(counter, streams, has_begun, is_over))
            try:
                await asyncio.gather(*(has_begun.wait() for has_begun in begun))
                await depart
            finally:
                is_over.set()

    async def scale_down(self, streams: int) -> None:
        # Nobody asks while the second replica comes back, which costs the more of a small machine.
        await self.under_load(streams, self.each(lambda one: one.scale(1)))
        await self.each(lambda one: one.scale(2))

    async def roll_out(self, streams: int) -> None:
        await self.under_load(streams, self.each(Deployment.roll_out))

    async def delete_pods(self, streams: int) -> None:
        await self.under_load(streams, self.each(Deployment.evict))

    async def drain_node(self, streams: int) -> None:
        await self.under_load(streams, drain_node(self.deployments))


async def _keep_open(
    counter: StreamCounter, streams: int, has_begun: asyncio.Event, is_over: asyncio.Event
) -> None:
    before = counter.begun
    async with counter.load(streams):
        while counter.begun < before + streams:  # noqa: ASYNC110 - it has no event to wait for
            await asyncio.sleep(0.05)
        has_begun.set()
        await is_over.wait()


async def drain_node(deployments: Sequence[Deployment]) -> None:
    """Drain a node of the deployments' pods, and let it back in so that others find room."""
    one, names = deployments[0], [deployment.name for deployment in deployments]
    node = (await one.pods())[0]["spec"]["nodeName"]
    leaving = {
        pod["metadata"]["uid"]
        for deployment in deployments
        for pod in await deployment.pods()
        if pod["spec"]["nodeName"] == node
    }
    drain = asyncio.create_task(
        one.kubectl(
            *("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force"),
            *(f"--pod-selector=mizzen.dev/deployment in ({','.join(names)})",),
            f"--timeout={LIMIT_S}s",
        )
    )
    try:
        while not (await one.get("node", node))["spec"].get("unschedulable"):
            assert not drain.done() or not drain.exception(), drain.exception()
            await asyncio.sleep(0.1)
        # The budgets keep the last replicas until others serve, which needs room.
        await one.kubectl("uncordon", node)
        await drain
    finally:
        await one.kubectl("uncordon", node)
    await asyncio.gather(*(deployment.replaced(leaving) for deployment in deployments))


async def measure(
    name: str,
    times: int,
    depart: Callable[[], Awaitable[None]],
    *,
    at_once: int,
    ends: Callable[[], Counter[str]],
    open_streams: Sequence[int],
    deadline: float = math.inf,
) -> Row:
    """Let replicas depart so often, some at once; return how the streams ended meanwhile.

    `open_streams` grows by each pod that leaves. After the deadline none departs any more.
    """
    before, left_before, begun = ends(), len(open_streams), time.monotonic()
    departed = 0
    while departed < times and time.monotonic() < deadline:
        await depart()
        departed += at_once
        print(
            f"{name} {departed}/{times} at {time.monotonic() - begun:.0f} s: {dict(ends())}, "
            f"open on the leaving pods: {list(open_streams[left_before:])}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    ended, left = ends() - before, open_streams[left_before:]
    return Row(
        *(name, departed, len(left), sum(count > 0 for count in left), sum(left)),
        *(ended[WHOLE], ended[REFUSED], ended[CUT], round(time.monotonic() - begun, 1)),
    )


def deployment_spec() -> Json:
    """A deployment of the quickstart's model that leaves room for many beside it."""
    return {
        "model": {"source": "pvc://models/smollm2", "maxModelLen": 512},
        "replicas": 2,
        "accelerator": {"resource": "none"},
        "engine": {"kvCacheGiB": 0.1, "maxNumSeqs": 8},
    }


async def run(options: argparse.Namespace) -> tuple[list[Row], list[Usage]]:
    """Run every kind of departure, and delete the deployments in the end."""
    names = [f"leaving-{number}" for number in range(options.deployments)]
    deployments = [Deployment(name, options.namespace) for name in names]
    url = options.url or await gateway_url(deployments[0])
    counters = [
        StreamCounter(url, name, options.tokens, options.api_key, options.pause) for name in names
    ]
    fleet, leaving = Fleet(deployments, counters), LeavingPods(names)
    try:
        for one in deployments:
            document = {
                **{"kind": "LLMDeployment", "metadata": {"name": one.name}},
                "spec": deployment_spec(),
            }
            await apply(one, document)
        await fleet.each(lambda one: one.settle(2))
        path = f"/api/v1/namespaces/{options.namespace}/pods"
        before, begun = await system_usage(deployments[0]), time.monotonic()
        async with await open_client() as client, beside(Api(client).watch(path, leaving.see)):
            rows = await depart_in_every_way(fleet, options, leaving.streams)
        after, seconds = await system_usage(deployments[0]), time.monotonic() - begun
    finally:
        await deployments[0].kubectl("delete", "llmd", "--ignore-not-found", *names)
    for error in (error for counter in counters for error in counter.errors):
        print(error, file=sys.stderr)
    used = [Usage.between(p, before[p], after[p], seconds) for p in before if p in after]
    return rows, used


async def depart_in_every_way(
    fleet: Fleet, options: argparse.Namespace, open_streams: Sequence[int]
) -> list[Row]:
    """Return a row of each kind of departure."""
    # The dearest first, so that a limit of time leaves out the most alike.
    kinds = (
        ("node drains", options.drains, fleet.drain_node),
        ("rollouts", options.rollouts, fleet.roll_out),
        ("pod deletions", options.deletions, fleet.delete_pods),
        ("scale-downs", options.scale_downs, fleet.scale_down),
    )
    deadline = time.monotonic() + 60 * options.minutes
    return [
        await measure(
            *(name, times, lambda depart=depart: depart(options.streams)),
            at_once=len(fleet.deployments), ends=fleet.ends, open_streams=open_streams,
            deadline=deadline,
        )
        for name, times, depart in kinds if times
    ]  # fmt: skip


def as_table(rows: Collection[Row]) -> str:
    """Return the rows as a Markdown table, with their sum."""
    sums = [sum(column) for column in list(zip(*map(astuple, rows), strict=True))[1:]]
    cells = [*map(astuple, rows), ("all", *sums[:-1], round(sums[-1], 1))]
    return "\n".join(
        [
            "| Departure | times | pods that left | of them with open streams | streams open then "
            "| streams whole | refused | cut | seconds |",
            "|---|---|---|---|---|---|---|---|---|",
            *(f"| {' | '.join(map(str, row))} |" for row in cells),
        ]
    )


def main() -> None:
    """Print the tables; 1 where a stream was cut or refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--namespace", default="quickstart")
    parser.add_argument("--url", default="", help="the gateway; found in mizzen-system otherwise")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--deployments", type=int, default=5)
    parser.add_argument("--streams", type=int, default=3, help="open at once, of each deployment")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two streams")
    parser.add_argument("--scale-downs", type=int, default=100)
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--drains", type=int, default=20)
    parser.add_argument("--deletions", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=math.inf, help="none departs later")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    rows, usage = asyncio.run(run(options))
    if options.json:
        print(json.dumps([asdict(row) for row in (*rows, *usage)], indent=2))
    else:
        print(as_table(rows), as_usage_table(usage), sep="\n\n")
    sys.exit(any(row.cut or row.refused for row in rows))


if __name__ == "__main__":
    main()
