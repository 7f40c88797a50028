"""How many streams are cut while replicas of a real deployment leave under load.

    python -m benchmarks.cut_streams --api-key mz-... [--scale-downs 100] [--rollouts 20]
        [--drains 20] [--evictions 20] [--streams 4]

Needs a cluster with the chart and a deployment in it (`make demo` leaves both), and kubectl that
reaches them. A counting client keeps streams open through the gateway from the first departure to
the last. Scale-downs go from two replicas to one, a rollout changes an engine setting, a node drain
is `kubectl drain` of the deployment's pods on one node, and an eviction is `kubectl delete pod`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.stream_counter import CUT, REFUSED, WHOLE, StreamCounter

LIMIT_S = 900
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """What happened to the streams while one kind of departure went on."""

    departure: str
    times: int
    whole: int
    refused: int
    cut: int
    seconds: float


class Deployment:
    """One LLMDeployment, through kubectl."""

    def __init__(self, name: str, namespace: str) -> None:
        self.name, self.namespace = name, namespace
        self._changes = 0

    async def kubectl(self, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *("kubectl", "-n", self.namespace, *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, said = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {said.decode().strip()}")
        return out.decode()

    async def get(self, *what: str) -> Json:
        found: Json = json.loads(await self.kubectl("get", *what, "-o", "json"))
        return found

    async def scale(self, replicas: int) -> None:
        await self.kubectl("scale", f"llmd/{self.name}", f"--replicas={replicas}")
        await self.settle(replicas)

    async def settle(self, replicas: int) -> None:
        """Wait until exactly so many replicas are there, ready, and of the newest revision."""
        deadline = time.monotonic() + LIMIT_S
        status: Json = {}
        while time.monotonic() < deadline:
            resource = await self.get("llmd", self.name)
            status = resource["status"]
            is_seen = status["observedGeneration"] == resource["metadata"]["generation"]
            counts = {status.get(k) for k in ("replicas", "readyReplicas", "updatedReplicas")}
            if is_seen and counts == {replicas} and len(status.get("pods") or []) == replicas:
                return
            await asyncio.sleep(0.5)
        raise RuntimeError(f"{self.name} did not settle at {replicas}: {json.dumps(status)}")

    async def pods(self) -> list[Json]:
        selector = f"mizzen.dev/deployment={self.name}"
        found = (await self.get("pods", "-l", selector))["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    # Departures; each begins and ends with two replicas.

    async def scale_down(self) -> None:
        await self.scale(1)
        await self.scale(2)

    async def roll_out(self) -> None:
        self._changes += 1
        setting = {"spec": {"engine": {"maxNumSeqs": 8 + self._changes % 2}}}
        await self.kubectl("patch", f"llmd/{self.name}", "--type=merge", "-p", json.dumps(setting))
        await self.settle(2)

    async def evict(self) -> None:
        name = (await self.pods())[0]["metadata"]["name"]
        await self.kubectl("delete", "pod", name, "--wait=false")
        await self._replaced({name})

    async def drain_node(self) -> None:
        """Drain a node of the deployment's pods, and let it back in so that others find room."""
        node = (await self.pods())[0]["spec"]["nodeName"]
        leaving = {
            pod["metadata"]["name"] for pod in await self.pods() if pod["spec"]["nodeName"] == node
        }
        drain = asyncio.create_task(
            self.kubectl(
                *("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force"),
                *(f"--pod-selector=mizzen.dev/deployment={self.name}", f"--timeout={LIMIT_S}s"),
            )
        )
        try:
            while not (await self.get("node", node))["spec"].get("unschedulable"):
                assert not drain.done() or not drain.exception(), drain.exception()
                await asyncio.sleep(0.1)
            # The budget keeps the last replica until another one serves, which needs room.
            await self.kubectl("uncordon", node)
            await drain
        finally:
            await self.kubectl("uncordon", node)
        await self._replaced(leaving)

    async def _replaced(self, gone: set[str]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while {pod["metadata"]["name"] for pod in await self.pods()} & gone:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{', '.join(sorted(gone))} did not leave")
            await asyncio.sleep(0.2)
        await self.settle(2)


async def measure(
    name: str, times: int, depart: Callable[[], Awaitable[None]], counter: StreamCounter
) -> Row:
    """Let replicas depart so often, and return how the streams that ended meanwhile ended."""
    before, begun = counter.ends.copy(), time.monotonic()
    for number in range(times):
        await depart()
        print(f"{name} {number + 1}/{times}: {dict(counter.ends)}", file=sys.stderr, flush=True)
    ended = counter.ends - before
    return Row(
        name, times, ended[WHOLE], ended[REFUSED], ended[CUT], round(time.monotonic() - begun, 1)
    )


async def run(options: argparse.Namespace) -> list[Row]:
    """Run every kind of departure under one load."""
    deployment = Deployment(options.deployment, options.namespace)
    await deployment.scale(2)
    counter = StreamCounter(
        options.url or await gateway_url(deployment),
        options.model or options.deployment,
        max_tokens=options.tokens,
        api_key=options.api_key,
    )
    kinds = (
        ("scale-downs", options.scale_downs, deployment.scale_down),
        ("rollouts", options.rollouts, deployment.roll_out),
        ("node drains", options.drains, deployment.drain_node),
        ("pod deletions", options.evictions, deployment.evict),
    )
    rows = []
    async with counter.load(options.streams):
        for name, times, depart in kinds:
            rows.append(await measure(name, times, depart, counter))
        closing = counter.ends.copy()
    last = counter.ends - closing  # open at the end, and let finish
    rows.append(Row("after the last", 0, last[WHOLE], last[REFUSED], last[CUT], 0.0))
    for error in counter.errors:
        print(error, file=sys.stderr)
    return rows


async def gateway_url(deployment: Deployment) -> str:
    """Return the gateway's address in the cluster, which a node can reach."""
    service = await deployment.get("service", "mizzen-gateway", "-n", "mizzen-system")
    return f"http://{service['spec']['clusterIP']}:8080"


def as_table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table, with their sum."""
    lines = [
        "| Departure | times | streams whole | refused | cut | seconds |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r.departure} | {r.times} | {r.whole} | {r.refused} | {r.cut} | {r.seconds} |"
            for r in rows
        ),
    ]
    whole, refused, cut = (sum(getattr(r, field) for r in rows) for field in (WHOLE, REFUSED, CUT))
    times, seconds = sum(r.times for r in rows), round(sum(r.seconds for r in rows), 1)
    return "\n".join([*lines, f"| all | {times} | {whole} | {refused} | {cut} | {seconds} |"])


def deployment_arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of what names a deployment and the gateway before it."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--deployment", default="smollm2")
    parser.add_argument("--namespace", default="quickstart")
    parser.add_argument("--model", default="", help="served name; the deployment's when left out")
    parser.add_argument("--url", default="", help="the gateway; found in mizzen-system otherwise")
    parser.add_argument("--api-key", default="")
    return parser


def main() -> None:
    """Print the table; 1 where a stream was cut or refused."""
    parser = deployment_arguments(__doc__)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--scale-downs", type=int, default=100)
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--drains", type=int, default=20)
    parser.add_argument("--evictions", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = asyncio.run(run(options))
    print(json.dumps([asdict(row) for row in rows], indent=2) if options.json else as_table(rows))
    sys.exit(any(row.cut or row.refused for row in rows))


if __name__ == "__main__":
    main()
