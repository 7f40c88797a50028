"""The few raw calls this package makes to the API server. No typed models."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, cast
from urllib.parse import urlencode

from aiohttp import ClientResponse, ClientTimeout
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.config.incluster_config import load_incluster_config
from kubernetes.aio.config.kube_config import load_kube_config

KubeObject = Mapping[str, Any]
_PAGE = 500
_WATCH_SECONDS = 290
# Bookmarks come about once a minute: a longer silence is a dead connection, not a quiet cluster.
_WATCH_SILENCE_SECONDS = 100
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class KubeError(Exception):
    """The API server answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class NoClusterError(Exception):
    """Nothing says where the cluster is."""


class GoneError(KubeError):
    """The watch cannot go on from this resourceVersion: list again."""


@dataclass(frozen=True, slots=True)
class Listing:
    """All objects of a kind at one resourceVersion."""

    items: list[KubeObject]
    resource_version: str


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change; a BOOKMARK only moves the resourceVersion."""

    kind: str
    item: KubeObject
    resource_version: str


class KubeSource(Protocol):
    """What a watch needs of an API server."""

    async def list_all(self, path: str, query: Mapping[str, str]) -> Listing:
        """Return everything under `path` that `query` selects."""
        ...

    def watch(
        self, path: str, query: Mapping[str, str], resource_version: str
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchEvent]]:
        """Open a watch: the changes after `resource_version`, until the server ends it."""
        ...


class KubeClient:
    """Requests through the official client's connection, authentication and TLS."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()  # type: ignore[no-untyped-call]

    async def list_all(self, path: str, query: Mapping[str, str]) -> Listing:
        """Return everything under `path` that `query` selects, read in pages."""
        items: list[KubeObject] = []
        page: dict[str, str] = {}
        while True:
            response = await self._get(
                path, {**query, "limit": str(_PAGE), **page}, ClientTimeout(total=60)
            )
            async with response:
                document = json.loads(await response.read())
            items += document.get("items") or []
            metadata = document["metadata"]
            if not metadata.get("continue"):
                return Listing(items, metadata["resourceVersion"])
            page = {"continue": metadata["continue"]}

    @asynccontextmanager
    async def watch(
        self, path: str, query: Mapping[str, str], resource_version: str
    ) -> AsyncIterator[AsyncIterator[WatchEvent]]:
        """Open a watch: the changes after `resource_version`, until the server ends it."""
        query = {
            **query,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_SECONDS),
            "resourceVersion": resource_version,
        }
        timeout = ClientTimeout(total=None, sock_connect=10, sock_read=_WATCH_SILENCE_SECONDS)
        response = await self._get(path, query, timeout)
        try:
            yield (_parse_event(line) async for line in response.content)
        finally:
            response.close()

    async def call(self, method: str, path: str, body: KubeObject | None = None) -> dict[str, Any]:
        """Send one request and return the answer's document.

        Raises:
            KubeError: the answer is not a success.
        """
        response = await self._send(method, path, ClientTimeout(total=30), body)
        async with response:
            document: dict[str, Any] = json.loads(await response.read())
        return document

    async def merge(self, path: str, patch: KubeObject) -> None:
        """Apply a merge patch to one object.

        Raises:
            KubeError: the answer is not a success.
        """
        limits = ClientTimeout(total=10)
        response = await self._send(
            "PATCH", path, limits, patch, content_type="application/merge-patch+json"
        )
        response.close()

    async def _get(
        self, path: str, query: Mapping[str, str], limits: ClientTimeout
    ) -> ClientResponse:
        return await self._send("GET", f"{path}?{urlencode(query)}", limits, None)

    async def _send(
        self,
        method: str,
        path: str,
        limits: ClientTimeout,
        body: KubeObject | None,
        *,
        content_type: str = "application/json",
    ) -> ClientResponse:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        # Reads the token again from its file when that is due.
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, None)
        answer = await self._client.rest_client.request(  # type: ignore[no-untyped-call]
            method,
            self._client.configuration.host + path,
            headers=headers,
            body=body,
            _request_timeout=limits,
        )
        response = cast(ClientResponse, answer.response)
        if response.status >= 300:
            async with response:
                raise _error(response.status, await response.read())
        return response


async def connect(kubeconfig: Path | None) -> KubeClient:
    """Return a client for the cluster this process runs in, or the one a kubeconfig names.

    Raises:
        NoClusterError: there is no usable configuration.
    """
    configuration = Configuration()
    try:
        await _load(configuration, kubeconfig)
    except (ConfigException, OSError) as error:
        raise NoClusterError(f"No access to a cluster: {str(error).rstrip('.')}.") from error
    return KubeClient(ApiClient(configuration))


# The official client's loaders carry no annotations.
async def _load(configuration: Configuration, kubeconfig: Path | None) -> None:
    if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
        load_incluster_config(  # type: ignore[no-untyped-call]
            client_configuration=configuration
        )
    else:
        await load_kube_config(  # type: ignore[no-untyped-call]
            config_file=None if kubeconfig is None else str(kubeconfig),
            client_configuration=configuration,
            persist_config=False,
        )


def own_namespace() -> str:
    """Return the namespace of this pod, `default` outside of one."""
    return _OWN_NAMESPACE.read_text().strip() if _OWN_NAMESPACE.exists() else "default"


def _parse_event(line: bytes) -> WatchEvent:
    event = json.loads(line)
    item = event["object"]
    if event["type"] == "ERROR":
        raise _error(int(item.get("code", 500)), line)
    return WatchEvent(event["type"], item, item["metadata"]["resourceVersion"])


def _error(status: int, body: bytes) -> KubeError:
    try:
        document = json.loads(body)
        message = str(document.get("object", document).get("message", ""))
    except (ValueError, AttributeError):
        message = body[:200].decode(errors="replace")
    return GoneError(status, message) if status == 410 else KubeError(status, message)
