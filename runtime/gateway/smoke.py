"""What `helm test` runs: serve a model for a moment, get tokens through the gateway, clean up."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

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
    namespace: str = Field("default", description="Where the test's LLMDeployment goes.")
    name: str = Field("mizzen-test", description="Name of the test's LLMDeployment.")
    model_source: str = Field("", description="What to serve for the test.")
    served_model: str = Field("", description="Or: a model that is served already.")
    api_key: str = Field("", description="Key for the gateway.")
    kubeconfig: Path | None = Field(None, description="Cluster access from outside a pod.")
    timeout_s: float = Field(300.0, gt=0, description="Time for all of it.")


def build_deployment(config: SmokeConfig) -> KubeObject:
    """Return the test's LLMDeployment: one replica on the CPU."""
    return {
        "apiVersion": "mizzen.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {
            "name": config.name,
            "namespace": config.namespace,
            "labels": {"app.kubernetes.io/part-of": "mizzen"},
        },
        "spec": {
            "model": {"source": config.model_source, "maxModelLen": 512},
            "replicas": 1,
            "accelerator": {"resource": "none"},
        },
    }


async def run(config: SmokeConfig) -> str:
    """Run the test and return what it saw.

    Raises:
        SmokeError: no tokens came in time.
    """
    started_at = time.monotonic()
    try:
        async with asyncio.timeout(config.timeout_s):
            if config.served_model:
                answer = await ask_until_ready(config, config.served_model)
            else:
                async with served(config) as model:
                    answer = await ask_until_ready(config, model)
    except TimeoutError:
        raise SmokeError(f"No answer within {config.timeout_s:g} seconds.") from None
    return f"{answer!r} after {time.monotonic() - started_at:.1f} s"


@asynccontextmanager
async def served(config: SmokeConfig) -> AsyncIterator[str]:
    """Serve the model while the block runs; the value is the name to ask for."""
    path = f"/apis/mizzen.dev/v1alpha1/namespaces/{config.namespace}/llmdeployments"
    one = f"{path}/{config.name}"
    try:
        async with await connect(config.kubeconfig) as kube:
            # What a test that was killed has left behind.
            await _delete(kube, one)
            await kube.call("POST", path, build_deployment(config))
            try:
                await _wait_until_ready(kube, one)
                yield f"{config.namespace}/{config.name}"
            finally:
                await _delete(kube, one)
    except (KubeError, NoClusterError) as error:
        raise SmokeError(f"The API server refused: {error}") from error


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


async def ask_until_ready(config: SmokeConfig, model: str) -> str:
    """Ask for a completion until the model answers; the gateway may know it a moment later than we.

    Raises:
        SmokeError: the gateway refuses for a reason that waiting does not mend.
    """
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    async with ClientSession(
        base_url=config.gateway_url, headers=headers, timeout=ClientTimeout(total=None)
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
