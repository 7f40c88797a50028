"""Makes the Secret `mizzen-admin` where Helm cannot: a Job of the one-file install runs this."""

from __future__ import annotations

import asyncio
import secrets
import sys

from mizzen.runtime.gateway.kube import (
    KubeClient,
    KubeError,
    KubeObject,
    NoClusterError,
    connect,
    own_namespace,
)

NAME = "mizzen-admin"


def build_secret(namespace: str, token: str) -> KubeObject:
    """Return the Secret with the token by which the operator talks to runtimes and trainers."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": NAME,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/part-of": "mizzen"},
        },
        "type": "Opaque",
        "stringData": {"token": token},
    }


async def ensure_token(kube: KubeClient, namespace: str) -> bool:
    """Create the Secret unless it is there; return whether it was created."""
    path = f"/api/v1/namespaces/{namespace}/secrets"
    try:
        await kube.call("POST", path, build_secret(namespace, secrets.token_urlsafe(32)))
    except KubeError as error:
        if error.status == 409:
            return False
        raise
    return True


async def main() -> int:
    """Run once; return the exit status."""
    namespace = own_namespace()
    try:
        async with await connect(None) as kube:
            created = await ensure_token(kube, namespace)
    except (KubeError, NoClusterError) as error:
        sys.stderr.write(f"Cannot create the Secret {namespace}/{NAME}: {error}\n")
        return 1
    sys.stdout.write(f"Secret {namespace}/{NAME} {'created' if created else 'is there'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
