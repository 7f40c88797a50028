"""kubeconfig files: how each server and the administrator reach the API server."""

import base64
import json
import os
from pathlib import Path

CONTEXT = "mizzen"


def write_kubeconfig(path: Path, *, server: str, pki: Path, identity: str) -> None:
    """Write one with everything inside, so that the file can be copied to another place."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": CONTEXT,
        "clusters": [
            {
                "name": CONTEXT,
                "cluster": {
                    "server": server,
                    "certificate-authority-data": _encoded(pki / "ca.crt"),
                },
            }
        ],
        "users": [
            {
                "name": identity,
                "user": {
                    "client-certificate-data": _encoded(pki / f"{identity}.crt"),
                    "client-key-data": _encoded(pki / f"{identity}.key"),
                },
            }
        ],
        "contexts": [{"name": CONTEXT, "context": {"cluster": CONTEXT, "user": identity}}],
    }
    # JSON is YAML, and the standard library can write it.
    text = json.dumps(document, indent=2) + "\n"
    if path.exists() and path.read_text() == text:
        return
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
