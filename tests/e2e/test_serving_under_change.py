"""Replicas are killed, scaled and rolled under a steady stream of requests; none may fail."""

import asyncio
from dataclasses import dataclass, field

import pytest
from openai import AsyncOpenAI, OpenAIError

from tests.e2e.conftest import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
NAME = ("smollm2", "-n", "quickstart")


@dataclass
class Load:
    """Streams that follow each other without a pause, a few side by side."""

    client: AsyncOpenAI
    finished: int = 0
    failed: list[str] = field(default_factory=list)

    async def run(self, stop: asyncio.Event, *, streams: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(self._keep_asking(stop))

    async def _keep_asking(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await self._ask()
                self.finished += 1
            except OpenAIError as error:
                self.failed.append(repr(error))

    async def _ask(self) -> None:
        stream = await self.client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Tell me a story about a ship."}],
            max_tokens=24, stream=True, extra_body={"ignore_eos": True},
        )  # fmt: skip
        reasons = [c.choices[0].finish_reason async for c in stream if c.choices]
        if reasons[-1] != "length":
            raise OpenAIError(f"a stream ended with {reasons[-1:]}")


async def settle(cluster: Cluster, replicas: int) -> None:
    """Wait until exactly this many replicas exist, all ready and of the newest revision."""
    for _ in range(900):
        resource = await asyncio.to_thread(cluster.get, "llmd", *NAME)
        status, generation = resource["status"], resource["metadata"]["generation"]
        counts = {status.get(key) for key in ("replicas", "readyReplicas", "updatedReplicas")}
        if status["observedGeneration"] == generation and counts == {replicas}:
            return
        await asyncio.sleep(1)
    raise AssertionError(f"did not settle at {replicas}: {status}")


async def leader_pods(cluster: Cluster) -> list[str]:
    listed = await asyncio.to_thread(
        cluster.kubectl, "get", "pods", "-n", "quickstart", "-l", "mizzen.dev/deployment=smollm2",
        "-o", "jsonpath={.items[*].metadata.name}",
    )  # fmt: skip
    return listed.split()


async def test_no_request_fails_while_replicas_come_and_go(quickstart: Cluster) -> None:
    client = AsyncOpenAI(
        base_url=f"{quickstart.gateway}/v1", api_key=quickstart.api_key, max_retries=0, timeout=600
    )
    kubectl = quickstart.kubectl
    await asyncio.to_thread(kubectl, "scale", "llmd/smollm2", "-n", "quickstart", "--replicas=2")
    await settle(quickstart, 2)
    load, stop = Load(client), asyncio.Event()
    running = asyncio.create_task(load.run(stop, streams=3))
    try:
        # A replica is deleted behind the operator's back: it drains on SIGTERM, and is replaced.
        victim = (await leader_pods(quickstart))[0]
        await asyncio.to_thread(
            kubectl, "delete", "pod", victim, "-n", "quickstart", "--wait=false"
        )
        await asyncio.sleep(5)
        await settle(quickstart, 2)
        # Scaled down and up.
        for replicas in (1, 2):
            await asyncio.to_thread(
                kubectl, "scale", "llmd/smollm2", "-n", "quickstart", f"--replicas={replicas}"
            )
            await settle(quickstart, replicas)
        # A changed engine setting rolls both.
        await asyncio.to_thread(
            kubectl, "patch", "llmd/smollm2", "-n", "quickstart", "--type=merge",
            "-p", '{"spec":{"engine":{"maxNumSeqs":12}}}',
        )  # fmt: skip
        await settle(quickstart, 2)
    finally:
        stop.set()
        await running
    assert load.failed == []
    assert load.finished > 20
