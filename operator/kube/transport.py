"""HTTP to the API server: JSON in, JSON out, errors as types.

It stands on kubernetes.aio's REST client (TLS, tokens, proxies) and goes around its typed models,
which cost several times the work. Must not know any kind.
"""

import json
import ssl
from typing import Any, Protocol
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio.client import ApiClient

from mizzen.operator.kube.documents import Json
from mizzen.operator.kube.errors import Unavailable, error_from

JSON = "application/json"
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"


class Transport(Protocol):
    """One request to the API server; tests put a fault-injecting one here."""

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Json | None = None,
        content_type: str = JSON,
        timeout_s: float = 30.0,
    ) -> Json:
        """Return the answer's document.

        Raises:
            KubeError: any answer that is not a success.
        """


class HttpTransport:
    """The real one."""

    def __init__(self, api: ApiClient) -> None:
        self._api = api

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Json | None = None,
        content_type: str = JSON,
        timeout_s: float = 30.0,
    ) -> Json:
        """Send one request and return the answer's document."""
        url = self._api.configuration.host + path
        if query:
            url += "?" + urlencode(query)
        headers = {"Accept": JSON, "Content-Type": content_type, **self._api.default_headers}
        # Fills in the token, and reads it again from its file when that is due.
        await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        try:
            answer = await self._api.rest_client.request(  # type: ignore[no-untyped-call]
                method, url, headers=headers, body=body, _request_timeout=timeout_s
            )
            data = await answer.read()
        except (TimeoutError, aiohttp.ClientError, ssl.SSLError, OSError) as error:
            raise Unavailable from error
        document = _parse(data)
        if not 200 <= answer.status < 300:
            raise error_from(answer.status, document, retry_after=answer.headers.get("Retry-After"))
        return document


def _parse(data: bytes) -> Json:
    """Return the document; a proxy's HTML error page becomes an empty one."""
    try:
        document: Any = json.loads(data)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
