"""The gateway on a real API server, with no more rights than the chart gives it."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import ClientSession, web

from hack.cluster import gobuild
from hack.cluster.api_only import ApiCluster
from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.keys import hash_key, make_key
from mizzen.runtime.gateway.kube import KubeClient, KubeError, connect
from mizzen.runtime.gateway.server import Gateway
from mizzen.runtime.gateway.wake import wake_path

CHAT = "/v1/chat/completions"
KEY = make_key()


SCALED = {"min": 0, "max": 2, "idle": {"toZeroAfterSeconds": 600}}


def own_address() -> str:
    """An address of this machine that an EndpointSlice may hold: loopback ones are refused."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: it only asks the kernel for the way there.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback ones")
        return str(probe.getsockname()[0])


def apply(cluster: ApiCluster, *documents: dict[str, Any]) -> None:
    text = "\n---\n".join(json.dumps(document) for document in documents)
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)


def model(
    namespace: str, name: str = "tiny", *, scaling: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    spec: dict[str, Any] = {"model": {"source": "pvc://models/tiny", **fields}}
    if scaling is not None:
        spec["scaling"] = scaling
    return {
        "apiVersion": "mizzen.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def endpoint_slice(
    namespace: str, name: str, port: int, *, deployment: str = "tiny", ready: bool = True
) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"mizzen.dev/deployment": deployment},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}],
        "endpoints": [
            {
                "addresses": [own_address()],
                "conditions": {"ready": ready, "serving": ready, "terminating": False},
            }
        ],
    }


def key_secret(namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": "mizzen-key-test",
            "namespace": namespace,
            "labels": {"mizzen.dev/api-keys": "true"},
        },
        "stringData": {"test": hash_key(KEY)},
    }


def install_roles(cluster: ApiCluster, home: str, watched: list[str], folder: Path) -> Path:
    """Apply the gateway's account and roles from the chart; return a kubeconfig for it."""
    done = subprocess.run(
        [
            gobuild.binaries() / "helm",
            *("template", home, "charts/mizzen", "--namespace", home),
            *("--set", "crds.install=false"),
            *("--set-json", f"watchNamespaces={json.dumps(watched)}"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    account = f"{home}-mizzen-gateway"
    wanted = [
        document
        for document in yaml.safe_load_all(done.stdout)
        if document and document["metadata"]["name"].startswith(account)
    ]
    apply(
        cluster,
        *(d for d in wanted if d["kind"] in ("ServiceAccount", "Role", "ClusterRole")),
        *(d for d in wanted if d["kind"] in ("RoleBinding", "ClusterRoleBinding")),
        *(d for d in wanted if d["kind"].startswith("ValidatingAdmissionPolicy")),
    )
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    token = cluster.kubectl("create", "token", account, "-n", home).strip()
    config["users"][0]["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


class Door:
    """A gateway that watches the cluster, a client, and a replica per name."""

    def __init__(self, gateway: Gateway, client: ClientSession) -> None:
        self.gateway = gateway
        self.client = client
        self.runners: list[web.ServerRunner] = []

    async def replica(self, name: str) -> int:
        """Start a replica that answers with its name and the model asked for; return its port."""

        async def answer(request: web.BaseRequest) -> web.Response:
            return web.json_response({"from": name, "model": (await request.json())["model"]})

        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        await web.TCPSite(runner, "0.0.0.0", 0).start()
        self.runners.append(runner)
        return int(runner.addresses[0][1])

    async def ask(self, model: str, key: str = KEY) -> tuple[int, Any]:
        async with self.client.post(
            f"http://127.0.0.1:{self.gateway.port}{CHAT}",
            json={"model": model},
            headers={"Authorization": f"Bearer {key}"},
        ) as answer:
            return answer.status, await answer.json()

    async def becomes(self, model: str, fits: Callable[[int, Any], bool]) -> tuple[int, Any]:
        """Ask until the answer fits; a watch takes a moment."""
        async with asyncio.timeout(300):
            while True:
                status, document = await self.ask(model)
                if fits(status, document):
                    return status, document
                await asyncio.sleep(0.02)


@pytest.fixture
async def door(cluster: ApiCluster, namespace: str, tmp_path: Path) -> AsyncIterator[Door]:
    """A gateway whose home is the test's namespace and that serves models of all."""
    async for one in _open_door(cluster, namespace, [], tmp_path):
        yield one


async def _open_door(
    cluster: ApiCluster, namespace: str, watched: list[str], folder: Path, **settings: Any
) -> AsyncIterator[Door]:
    kubeconfig = install_roles(cluster, namespace, watched, folder)
    gateway = Gateway(
        GatewayConfig(
            host="127.0.0.1",
            port=0,
            metrics_port=0,
            kubeconfig=kubeconfig,
            namespace=namespace,
            watch_namespaces=watched,
            lame_duck_s=0,
            retry_window_s=0,
            **{"hold_timeout_s": 0, **settings},
        )
    )
    await gateway.start()
    async with ClientSession() as client:
        one = Door(gateway, client)
        async with asyncio.timeout(300):
            while not gateway.lifecycle.is_synced():  # noqa: ASYNC110  no event to wait for
                await asyncio.sleep(0.02)
        yield one
        for runner in one.runners:
            await runner.cleanup()
    await gateway.close()


async def test_a_model_is_found_followed_and_forgotten(
    cluster: ApiCluster, namespace: str, door: Door
) -> None:
    assert (await door.ask("tiny"))[0] == 401
    apply(cluster, key_secret(namespace))
    await door.becomes("tiny", lambda status, _: status == 404)
    apply(cluster, model(namespace))
    await door.becomes(f"{namespace}/tiny", lambda status, _: status == 503)

    a, b = await door.replica("a"), await door.replica("b")
    apply(cluster, endpoint_slice(namespace, "a", a))
    await door.becomes(f"{namespace}/tiny", lambda _, said: said.get("from") == "a")
    # The other replica comes and the first one is gated: as a rollout does it.
    apply(cluster, endpoint_slice(namespace, "b", b))
    await door.becomes(f"{namespace}/tiny", lambda _, said: said.get("from") == "b")
    apply(cluster, endpoint_slice(namespace, "a", a, ready=False))
    async with asyncio.timeout(300):
        while door.gateway.directory.ready_count((namespace, "tiny")) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    for _ in range(4):
        assert (await door.ask(f"{namespace}/tiny"))[1]["from"] == "b"

    cluster.kubectl("delete", "endpointslice", "b", "-n", namespace)
    await door.becomes(f"{namespace}/tiny", lambda status, _: status == 503)
    cluster.kubectl("delete", "llmdeployment", "tiny", "-n", namespace)
    await door.becomes(f"{namespace}/tiny", lambda status, _: status == 404)
    cluster.kubectl("delete", "secret", "mizzen-key-test", "-n", namespace)
    await door.becomes("tiny", lambda status, _: status == 401)


async def test_adapters_and_served_names_come_from_the_resource(
    cluster: ApiCluster, namespace: str, door: Door
) -> None:
    apply(cluster, key_secret(namespace), model(namespace, servedName="Big/Tiny"))
    apply(cluster, endpoint_slice(namespace, "a", await door.replica("a")))
    status, said = await door.becomes("Big/Tiny:support", lambda status, _: status == 200)
    assert said == {"from": "a", "model": "Big/Tiny:support"}
    status = {"status": {"adapters": [{"name": "support", "readyReplicas": 1}]}}
    cluster.kubectl(
        *("patch", "llmdeployment", "tiny", "-n", namespace, "--subresource=status"),
        *("--type=merge", "-p", json.dumps(status)),
    )
    async with asyncio.timeout(300):
        while "Big/Tiny:support" not in door.gateway.directory.names():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_gateway_confined_to_namespaces_works_with_roles_there(
    cluster: ApiCluster, namespace: str, tmp_path: Path
) -> None:
    other = f"{namespace}-other"
    cluster.create_namespace(other)
    async for door in _open_door(cluster, namespace, [namespace], tmp_path):
        apply(cluster, key_secret(namespace), model(other), model(namespace))
        apply(cluster, endpoint_slice(namespace, "a", await door.replica("a")))
        await door.becomes(f"{namespace}/tiny", lambda status, _: status == 200)
        assert (await door.ask(f"{other}/tiny"))[0] == 404
    cluster.kubectl("delete", "namespace", other, "--wait=false")


async def test_a_held_request_wakes_its_model_by_an_annotation_and_may_change_nothing_else(
    cluster: ApiCluster, namespace: str, tmp_path: Path
) -> None:
    async for door in _open_door(cluster, namespace, [], tmp_path, hold_timeout_s=120):
        apply(cluster, key_secret(namespace), model(namespace, scaling=SCALED))
        await door.becomes("nothing", lambda status, _: status == 404)
        async with asyncio.timeout(300):
            while door.gateway.directory.model((namespace, "tiny")) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        asking = asyncio.create_task(door.ask(f"{namespace}/tiny"))
        async with asyncio.timeout(300):
            while (found := wake_of(cluster, namespace)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        value, manager = found
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ;held=1", value)
        assert manager == "mizzen-gateway"
        apply(cluster, endpoint_slice(namespace, "a", await door.replica("a")))
        assert await asking == (200, {"from": "a", "model": "tiny"})

        path = wake_path((namespace, "tiny"))
        async with await connect(tmp_path / "kubeconfig") as kube:
            await policy_in_force(kube, path)
            for patch in (
                {"spec": {"scaling": {"max": 3}}},
                {"metadata": {"annotations": {"other": "x"}}},
                {"metadata": {"labels": {"other": "x"}}},
            ):
                with pytest.raises(KubeError, match="The gateway may"):
                    await kube.merge(path, patch)


async def policy_in_force(kube: KubeClient, path: str) -> None:
    """Return when the API server has learned of the policy, which takes it a moment."""
    async with asyncio.timeout(300):
        for n in itertools.count():
            try:
                await kube.merge(path, {"metadata": {"labels": {"n": str(n)}}})
            except KubeError:
                return
            await asyncio.sleep(0.1)


def wake_of(cluster: ApiCluster, namespace: str) -> tuple[str, str] | None:
    """Return the wake annotation and who wrote it, None where there is none."""
    text = cluster.kubectl(
        *("get", "llmdeployment", "tiny", "-n", namespace, "-o", "json", "--show-managed-fields")
    )
    metadata = json.loads(text)["metadata"]
    value = metadata.get("annotations", {}).get("mizzen.dev/wake")
    if value is None:
        return None
    managers = [f["manager"] for f in metadata["managedFields"] if "dev/wake" in json.dumps(f)]
    return value, managers[0]
