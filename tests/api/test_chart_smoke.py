"""The program of `helm test` on a real API server, with the rights its pod has."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from hack.cluster import gobuild
from hack.cluster.api_only import ApiCluster
from hack.cluster.errors import ClusterError
from mizzen.runtime.gateway import smoke
from mizzen.runtime.gateway.keys import verify_key
from mizzen.runtime.gateway.smoke import SmokeConfig, SmokeError

READY = {
    "type": "Ready",
    "status": "True",
    "reason": "AsExpected",
    "message": "1 of 1 replicas serve.",
    "lastTransitionTime": "2026-01-01T00:00:00Z",
    "observedGeneration": 1,
}


def _account_of_the_test(cluster: ApiCluster, home: str, folder: Path) -> Path:
    done = subprocess.run(
        [
            gobuild.binaries() / "helm",
            *("template", home, "charts/mizzen", "--namespace", home),
            *("--set", "crds.install=false,test.model=pvc://models/tiny"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    name = f"{home}-mizzen-test"
    for document in yaml.safe_load_all(done.stdout):
        if document and document["metadata"]["name"] == name and document["kind"] != "Pod":
            cluster.kubectl("apply", "-f", "-", stdin=json.dumps(document))
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    token = cluster.kubectl("create", "token", name, "-n", home).strip()
    config["users"][0]["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


def _stored_hash(cluster: ApiCluster, namespace: str, name: str) -> str:
    secret = json.loads(cluster.kubectl("get", "secret", name, "-n", namespace, "-o", "json"))
    assert secret["metadata"]["labels"]["mizzen.dev/api-keys"] == "true"
    return base64.b64decode(secret["data"][name]).decode()


async def test_it_serves_a_model_for_the_test_and_takes_it_away(
    cluster: ApiCluster, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = _account_of_the_test(cluster, namespace, tmp_path)
    monkeypatch.setattr(smoke, "_PAUSE_S", 0.05)
    name = f"{namespace}-mizzen-test"

    async def gateway(request: web.BaseRequest) -> web.Response:
        asked: dict[str, Any] = await request.json()
        key = request.headers["Authorization"].removeprefix("Bearer ")
        hashed = await asyncio.to_thread(_stored_hash, cluster, namespace, name)
        if asked["model"] != f"{namespace}/{name}" or not verify_key(key, hashed):
            return web.json_response({"error": "not the test's model and key"}, status=400)
        choice = {"message": {"role": "assistant", "content": "Hi"}}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 1}})

    runner = web.ServerRunner(web.Server(gateway))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    config = SmokeConfig(
        kubeconfig=kubeconfig,
        gateway_url=f"http://127.0.0.1:{runner.addresses[0][1]}",
        namespace=namespace,
        name=name,
        model_source="pvc://models/tiny",
        makes_key=True,
        timeout_s=600,
    )
    running = asyncio.create_task(smoke.run(config))
    # No operator here: the test says Ready in its place.
    await asyncio.to_thread(
        cluster.kubectl, "wait", "--for=create", f"llmd/{name}", "-n", namespace, "--timeout=300s"
    )
    await asyncio.to_thread(
        cluster.kubectl,
        *("patch", "llmdeployment", name, "-n", namespace, "--subresource=status"),
        *("--type=merge", "-p", json.dumps({"status": {"conditions": [READY]}})),
    )
    assert "'Hi' after" in await running
    for kind in ("llmdeployment", "secret"):
        with pytest.raises(ClusterError, match="NotFound"):
            cluster.kubectl("get", kind, name, "-n", namespace)
    await runner.cleanup()


async def test_what_the_api_server_refuses_is_said(
    cluster: ApiCluster, namespace: str, tmp_path: Path
) -> None:
    kubeconfig = _account_of_the_test(cluster, namespace, tmp_path)
    config = SmokeConfig(
        kubeconfig=kubeconfig,
        gateway_url="http://127.0.0.1:1",
        namespace="default",
        name=f"{namespace}-mizzen-test",
        model_source="pvc://models/tiny",
        timeout_s=60,
    )
    with pytest.raises(SmokeError, match="forbidden"):
        await smoke.run(config)
