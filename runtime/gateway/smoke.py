"""What `helm test` runs: serve a model for a moment, get tokens through the gateway, clean up."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from mizzen.runtime.gateway.keys import KEY_LABEL, hash_key, make_key
from mizzen.runtime.gateway.kube import (
    KubeClient,
    KubeError,
    KubeObject,
    NoClusterError,
    connect,
)

_PAUSE_S = 2.0
_SKIPPED = (
    "SKIPPED: nothing to ask. Set test.servedModel to a model that is served (quickstart/smollm2), "
    "or test.model to a source to serve for the test (pvc://models/smollm2)."
)


class SmokeError(Exception):
    """The installation does not work; the message says what was seen."""


class SmokeConfig(BaseSettings):
    """Settings of the test, which the chart fills in."""

    model_config = SettingsConfigDict(env_prefix="MIZZEN_SMOKE_", protected_namespaces=())

    gateway_url: str = Field(description="Address of the gateway.")
    namespace: str = Field("default", description="Where the test's objects go.")
    name: str = Field("mizzen-test", description="Name of the test's objects.")
    model_source: str = Field("", description="What to serve for the test.")
    served_model: str = Field("", description="Or: a model that is served already.")
    makes_key: bool = Field(False, description="Make an API key for the test.")
    pod_name: str = Field("", description="The test's pod, which takes its objects with it.")
    pod_uid: str = Field("", description="Uid of that pod.")
    kubeconfig: Path | None = Field(None, description="Cluster access from outside a pod.")
    timeout_s: float = Field(300.0, gt=0, description="Time for all of it.")


def build_deployment(config: SmokeConfig) -> KubeObject:
    """Return the test's LLMDeployment: one replica on the CPU."""
    return {
        "apiVersion": "mizzen.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": _metadata(config),
        "spec": {
            "model": {"source": config.model_source, "maxModelLen": 512},
            "replicas": 1,
            "accelerator": {"resource": "none"},
        },
    }


def build_key_secret(config: SmokeConfig, key: str) -> KubeObject:
    """Return the Secret that lets the test's key in."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(config, {KEY_LABEL: "true"}),
        "type": "Opaque",
        "stringData": {config.name: hash_key(key)},
    }


async def run(config: SmokeConfig) -> str:
    """Run the test and return what it saw.

    Raises:
        SmokeError: no tokens came in time.
    """
    started_at = time.monotonic()
    try:
        async with asyncio.timeout(config.timeout_s), AsyncExitStack() as stack:
            key, model = "", config.served_model
            if config.makes_key or not model:
                kube = await stack.enter_async_context(await connect(config.kubeconfig))
                if config.makes_key:
                    key = await stack.enter_async_context(_let_in(kube, config))
                if not model:
                    model = await stack.enter_async_context(_served(kube, config))
            answer = await ask_until_ready(config.gateway_url, model, key)
    except TimeoutError:
        raise SmokeError(f"No answer within {config.timeout_s:g} seconds.") from None
    except (KubeError, NoClusterError) as error:
        raise SmokeError(f"The API server refused: {error}") from error
    return f"{answer!r} after {time.monotonic() - started_at:.1f} s"


@asynccontextmanager
async def _let_in(kube: KubeClient, config: SmokeConfig) -> AsyncIterator[str]:
    """Have an API key while the block runs."""
    key = make_key()
    path = f"/api/v1/namespaces/{config.namespace}/secrets"
    async with _present(kube, path, build_key_secret(config, key)):
        yield key


@asynccontextmanager
async def _served(kube: KubeClient, config: SmokeConfig) -> AsyncIterator[str]:
    """Serve the model while the block runs; the value is the name to ask for."""
    path = f"/apis/mizzen.dev/v1alpha1/namespaces/{config.namespace}/llmdeployments"
    async with _present(kube, path, build_deployment(config)):
        await _wait_until_ready(kube, f"{path}/{config.name}")
        yield f"{config.namespace}/{config.name}"


@asynccontextmanager
async def _present(kube: KubeClient, path: str, document: KubeObject) -> AsyncIterator[None]:
    one = f"{path}/{document['metadata']['name']}"
    # What a test that was killed has left behind.
    await _delete(kube, one)
    await kube.call("POST", path, document)
    try:
        yield
    finally:
        await _delete(kube, one)


async def _wait_until_ready(kube: KubeClient, path: str) -> None:
    said = ""
    while True:
        ready = _condition(await kube.call("GET", path), "Ready")
        if ready.get("status") == "True":
            return
        text = f"{ready.get('reason', 'Pending')}: {ready.get('message', 'not yet looked at')}"
        if text != said:
            sys.stdout.write(f"waiting: {text}\n")
            said = text
        await asyncio.sleep(_PAUSE_S)


async def ask_until_ready(gateway_url: str, model: str, key: str) -> str:
    """Ask for a completion until the model answers; the gateway may know it a moment later than we.

    Raises:
        SmokeError: the gateway refuses for a reason that waiting does not mend.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with ClientSession(
        base_url=gateway_url, headers=headers, timeout=ClientTimeout(total=None)
    ) as session:
        while True:
            status, document = await _ask(session, model)
            if status == 200:
                return _text_of(document)
            # 401 as well: the test's own key is a few moments old.
            if status not in (0, 401, 404, 503):
                raise SmokeError(f"The gateway answered {status}: {document}")
            sys.stdout.write(f"waiting: {status or 'no connection'} {document}\n")
            await asyncio.sleep(_PAUSE_S)


async def _ask(session: ClientSession, model: str) -> tuple[int, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 8,
        "temperature": 0,
    }
    try:
        async with session.post("/v1/chat/completions", json=body) as response:
            return response.status, json.loads(await response.read())
    except (ClientError, OSError, ValueError) as error:
        return 0, str(error)


def _text_of(document: Mapping[str, Any]) -> str:
    tokens = document.get("usage", {}).get("completion_tokens", 0)
    text = document["choices"][0]["message"]["content"]
    if not tokens or not text:
        raise SmokeError(f"The model answered without tokens: {document}")
    return str(text)


async def _delete(kube: KubeClient, path: str) -> None:
    try:
        await kube.call("DELETE", path)
    except KubeError as error:
        if error.status != 404:
            raise


def _metadata(config: SmokeConfig, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": config.name,
        "namespace": config.namespace,
        "labels": {"app.kubernetes.io/part-of": "mizzen", **(labels or {})},
    }
    if config.pod_uid:
        owner = {"apiVersion": "v1", "kind": "Pod", "name": config.pod_name, "uid": config.pod_uid}
        metadata["ownerReferences"] = [owner]
    return metadata


def _condition(resource: Mapping[str, Any], kind: str) -> Mapping[str, str]:
    conditions = resource.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {})


def main() -> int:
    """Run with the settings of the environment; return the exit status."""
    config = SmokeConfig()
    if not config.served_model and not config.model_source:
        sys.stdout.write(_SKIPPED + "\n")
        return 0
    try:
        sys.stdout.write(f"PASSED: {asyncio.run(run(config))}\n")
    except SmokeError as error:
        sys.stdout.write(f"FAILED: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
