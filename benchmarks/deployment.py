"""A deployment of a real cluster as benchmarks use it, through kubectl."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

LIMIT_S = 900
Json = dict[str, Any]


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
            status = resource.get("status") or {}
            is_seen = status.get("observedGeneration") == resource["metadata"]["generation"]
            counts = {status.get(k) for k in ("replicas", "readyReplicas", "updatedReplicas")}
            if is_seen and counts == {replicas} and len(status.get("pods") or []) == replicas:
                return
            await asyncio.sleep(1)
        raise RuntimeError(f"{self.name} did not settle at {replicas}: {json.dumps(status)}")

    async def pods(self) -> list[Json]:
        selector = f"mizzen.dev/deployment={self.name}"
        found = (await self.get("pods", "-l", selector))["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    async def roll_out(self) -> None:
        """Change an engine setting, and wait for the new replicas."""
        self._changes += 1
        setting = {"spec": {"engine": {"maxNumSeqs": 8 + self._changes % 2}}}
        await self.kubectl("patch", f"llmd/{self.name}", "--type=merge", "-p", json.dumps(setting))
        await self.settle(2)

    async def evict(self) -> None:
        """Delete a pod, and wait for its successor."""
        pod = (await self.pods())[0]["metadata"]
        await self.kubectl("delete", "pod", pod["name"], "--wait=false")
        await self.replaced({pod["uid"]})

    async def replaced(self, gone: set[str]) -> None:
        """Wait until the pods of these UIDs have left and two replicas serve.

        A name says nothing: a pod that comes may have that of one that left.
        """
        deadline = time.monotonic() + LIMIT_S
        while {pod["metadata"]["uid"] for pod in await self.pods()} & gone:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{', '.join(sorted(gone))} did not leave")
            await asyncio.sleep(1)
        await self.settle(2)


async def apply(cluster: Deployment, resource: Json) -> None:
    """Create or change a resource, by kubectl."""
    document = {"apiVersion": "mizzen.dev/v1alpha1", **resource}
    process = await asyncio.create_subprocess_exec(
        *("kubectl", "-n", cluster.namespace, "apply", "-f", "-"), stdin=asyncio.subprocess.PIPE
    )
    await process.communicate(json.dumps(document).encode())
    if process.returncode:
        raise RuntimeError(f"kubectl apply refused {resource['metadata']['name']}")


async def gateway_url(deployment: Deployment) -> str:
    """Return the gateway's address in the cluster, which a node can reach."""
    service = await deployment.get("service", "mizzen-gateway", "-n", "mizzen-system")
    return f"http://{service['spec']['clusterIP']}:8080"


def deployment_arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of what names a deployment and the gateway before it."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--deployment", default="smollm2")
    parser.add_argument("--namespace", default="quickstart")
    parser.add_argument("--model", default="", help="served name; the deployment's when left out")
    parser.add_argument("--url", default="", help="the gateway; found in mizzen-system otherwise")
    parser.add_argument("--api-key", default="")
    return parser
