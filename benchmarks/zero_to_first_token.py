"""Seconds from a request that finds no replica to its first token, step by step.

    python -m benchmarks.zero_to_first_token --api-key mz-... [--rounds 5]

Needs a cluster with the chart, a deployment in it (`make demo` leaves both) and a kubectl context
that reaches them. The deployment may go to zero while this runs and gets its own size back at the
end. A round waits for zero, which takes about 75 seconds, and sends one streaming request through
the gateway. A step's time is when this script was told of it: the API's own timestamps have whole
seconds. Of a started container the kubelet tells up to a second late.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.control_plane import Api, beside
from benchmarks.deployment import (
    LIMIT_S,
    Deployment,
    deployment_arguments,
    gateway_url,
)
from benchmarks.rows import Rows, percentile
from mizzen.operator.desired.labels import DEPLOYMENT, WAKE
from mizzen.operator.kube.connect import open_client

Json = dict[str, Any]
# The shortest idle time that a deployment may have.
SIZE = {"scaling": {"min": 0, "max": 1, "idle": {"toZeroAfterSeconds": 30}}}
STEPS = (
    *("woken", "pod_created", "scheduled", "container_started", "loaded", "in_service"),
    "first_token",
)


@dataclass(slots=True)
class Start:
    """When each step of one start was first heard of, in seconds since `begun_at`."""

    deployment: str
    begun_at: float = 0.0
    steps_s: dict[str, float] = field(default_factory=dict)
    _earlier_wake: str | None = None

    def begin(self) -> None:
        """Count from now; what came before belongs to an earlier start."""
        self.steps_s.clear()
        self.begun_at = time.monotonic()

    def note(self, step: str) -> None:
        self.steps_s.setdefault(step, round(time.monotonic() - self.begun_at, 3))

    def see_deployment(self, kind: str, document: Json) -> None:
        """Take an event of the deployments' watch."""
        if document["metadata"]["name"] != self.deployment:
            return
        wake = document["metadata"].get("annotations", {}).get(WAKE, "")
        if kind != "LISTED" and wake != self._earlier_wake:
            self.note("woken")
        self._earlier_wake = wake

    def see_pod(self, kind: str, document: Json) -> None:
        """Take an event of the pods' watch."""
        labels = document["metadata"].get("labels", {})
        is_leaving = kind == "DELETED" or "deletionTimestamp" in document["metadata"]
        if labels.get(DEPLOYMENT) == self.deployment and not is_leaving:
            for step in steps_of(document):
                self.note(step)


def steps_of(pod: Json) -> list[str]:
    """Return how far a pod is on its way into service."""
    status = pod.get("status", {})
    true = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
    containers = status.get("containerStatuses", [])
    steps = {
        "pod_created": True,
        "scheduled": "PodScheduled" in true,
        "container_started": any("running" in c.get("state", {}) for c in containers),
        "loaded": "ContainersReady" in true,
        "in_service": "Ready" in true,
    }
    return [step for step, is_done in steps.items() if is_done]


async def first_token(
    url: str, model: str, start: Start, *, api_key: str = "", max_tokens: int = 8
) -> None:
    """Send one streaming request, note its first token and read it to its end.

    Raises:
        RuntimeError: it was refused, or its stream ended early.
    """
    body = {
        **{"model": model, "max_tokens": max_tokens, "ignore_eos": True, "stream": True},
        "messages": [{"role": "user", "content": "What is the capital city of France?"}],
    }
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=LIMIT_S)
    last = ""
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
        start.begin()
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"refused: {answer.status} {(await answer.text())[:200]}")
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue  # a comment while it is held, or an event's end
                last = line[6:].decode().strip()
                if last != "[DONE]" and _has_text(json.loads(last)):
                    start.note("first_token")
    if last != "[DONE]" or "first_token" not in start.steps_s:
        raise RuntimeError(f"the stream ended with {last[:200]!r}")


def _has_text(event: Json) -> bool:
    return any(choice["delta"].get("content") for choice in event.get("choices", []))


def size_change(spec: Json, wanted: Json) -> list[Json]:
    """Return the JSON patch that makes a spec's size, fixed or scaled, the wanted one's."""
    changes: list[Json] = []
    for name in ("replicas", "scaling"):
        if name in wanted:
            changes.append({"op": "add", "path": f"/spec/{name}", "value": wanted[name]})
        elif name in spec:
            changes.append({"op": "remove", "path": f"/spec/{name}"})
    return changes


async def resize(deployment: Deployment, wanted: Json) -> Json:
    """Give the deployment the wanted spec's size; return its spec before."""
    resource = f"llmd/{deployment.name}"
    spec: Json = (await deployment.get(resource))["spec"]
    if change := size_change(spec, wanted):
        await deployment.kubectl("patch", resource, "--type=json", "-p", json.dumps(change))
    return spec


@asynccontextmanager
async def going_to_zero(deployment: Deployment) -> AsyncIterator[None]:
    """Let the deployment go to zero inside the block."""
    own = await resize(deployment, SIZE)
    try:
        yield
    finally:
        await resize(deployment, own)


async def wait_for_zero(deployment: Deployment) -> None:
    """Wait until the deployment rests and its last pod is gone.

    Raises:
        RuntimeError: it did not come to that.
    """
    selector = f"mizzen.dev/deployment={deployment.name}"
    deadline = time.monotonic() + LIMIT_S
    scaling: Json = {}
    while time.monotonic() < deadline:
        resource = await deployment.get("llmd", deployment.name)
        scaling = resource.get("status", {}).get("scaling", {})
        if scaling.get("desired") == 0:
            pods = (await deployment.get("pods", "-l", selector))["items"]
            if not pods:
                return
        await asyncio.sleep(1)
    raise RuntimeError(
        f"{deployment.name} is not at zero after {LIMIT_S} s; does anybody else ask it? "
        f"status.scaling: {json.dumps(scaling)}"
    )


@asynccontextmanager
async def watched(api: Api, start: Start, namespace: str) -> AsyncIterator[None]:
    """Tell `start` of its deployment and its pods inside the block."""
    group = f"/apis/mizzen.dev/v1alpha1/namespaces/{namespace}/llmdeployments"
    pods = f"/api/v1/namespaces/{namespace}/pods"
    watches = (api.watch(group, start.see_deployment), api.watch(pods, start.see_pod))
    async with beside(*watches):
        await asyncio.sleep(1)  # both have listed what there is
        yield


async def run(options: argparse.Namespace, rows: Rows) -> list[Start]:
    """Measure so many starts, each from zero."""
    deployment = Deployment(options.deployment, options.namespace)
    url = options.url or await gateway_url(deployment)
    starts = []
    async with await open_client() as client, going_to_zero(deployment):
        for number in range(options.rounds):
            await wait_for_zero(deployment)
            start = Start(deployment.name)
            async with watched(Api(client), start, deployment.namespace):
                model = options.model or deployment.name
                await first_token(url, model, start, api_key=options.api_key)
            starts.append(start)
            rows.add({"start": number + 1, **in_order(start.steps_s)})
    return starts


def in_order(steps_s: dict[str, float]) -> dict[str, float | None]:
    """Return the steps as a row's columns; one that nobody told of is empty."""
    return {f"{step}_s": steps_s.get(step) for step in STEPS}


def percentiles(starts: Iterable[Start]) -> list[dict[str, str | float | None]]:
    """Return a row of each percentile over all starts."""
    found: list[dict[str, str | float | None]] = []
    each = [start.steps_s for start in starts]
    for rank in (50, 90, 99):
        known = {s: [one[s] for one in each if s in one] for s in STEPS}
        steps_s = {step: percentile(values, rank) for step, values in known.items() if values}
        found.append({"start": f"p{rank}", **in_order(steps_s)})
    return found


def main() -> None:
    """Print a JSON line per start, the percentiles, and a table."""
    parser = deployment_arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = Rows("Seconds from a request that finds no replica to each step and to its first token")
    try:
        starts = asyncio.run(run(options, rows))
    except RuntimeError as error:
        sys.exit(str(error))
    for row in percentiles(starts):
        rows.add(row)
    rows.print_table()


if __name__ == "__main__":
    main()
