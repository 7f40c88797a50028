"""The few requests that this tool itself sends to the API server, with the standard library."""

import json
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from hack.cluster.errors import ClusterError


class KubeApi:
    """The API server as the administrator sees it."""

    def __init__(self, url: str, pki: Path) -> None:
        """Take the address and the folder of the certificates."""
        self._url = url
        context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        # No proxy: the API server is on this machine.
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

    def is_ready(self) -> bool:
        """Say whether the API server serves."""
        try:
            with self._opener.open(f"{self._url}/readyz", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:  # refused, not yet TLS, or not yet ready
            return False

    def get(self, path: str) -> Any:
        """Return the object at a path; None when there is none."""
        return self._send("GET", path, None, "")

    def create(self, path: str, document: object) -> Any:
        """Create an object; one that is there already stays."""
        return self._send("POST", path, document, "application/json", accepted=409)

    def patch(self, path: str, operations: object) -> Any:
        """Apply a JSON patch."""
        return self._send("PATCH", path, operations, "application/json-patch+json")

    def _send(
        self, method: str, path: str, body: object, content_type: str, accepted: int = 404
    ) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": content_type} if content_type else {}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == accepted:
                return None
            words = error.read().decode(errors="replace")
            raise ClusterError(f"{method} {path} answered {error.code}: {words}") from error
