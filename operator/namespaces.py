"""Keeps in each namespace what all our pods there share, as long as there is a resource of ours.

Nothing owns these two objects, so that deleting one deployment does not take the token from the
others; the last resource to leave a namespace takes them with it.
"""

from __future__ import annotations

import asyncio
import base64

from mizzen.operator.config import OperatorConfig
from mizzen.operator.crds import finetunejob, llmdeployment
from mizzen.operator.desired import labels
from mizzen.operator.desired.network import (
    NETWORK_POLICY,
    build_admin_secret,
    build_network_policy,
)
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import Ref
from mizzen.operator.kube.errors import NotFound


class AdminTokenMissingError(NotFound):
    """The installation has no admin token to hand to its pods."""

    reason = "AdminTokenMissing"

    def __init__(self, *, name: str, namespace: str) -> None:
        super().__init__(
            f"There is no Secret {name} with a token in namespace {namespace}. The chart makes "
            "it: run helm upgrade."
        )


class Namespaces:
    """The shared objects of every namespace we have pods in."""

    def __init__(self, config: OperatorConfig) -> None:
        self._config = config
        # A thousand resources of one new namespace come at once: one of them writes.
        self._lock = asyncio.Lock()

    async def prepare(self, namespace: str, kube: Kube) -> None:
        """Have the admin token and the network policy in the namespace.

        Raises:
            AdminTokenMissingError: there is no token to copy.
        """
        own = self._config.namespace
        async with self._lock:
            await kube.apply(build_network_policy(namespace, operator_namespace=own))
            if namespace != own:
                token = await self._token(kube)
                await kube.apply(build_admin_secret(namespace, token=token))

    async def release(self, namespace: str, kube: Kube) -> None:
        """Take both away when the last resource of ours has left the namespace."""
        # Not while a resource that has just come is told that both are there.
        async with self._lock:
            for kind in (llmdeployment.KIND, finetunejob.KIND):
                if any(left["metadata"]["namespace"] == namespace for left in kube.store.all(kind)):
                    return
            await self._take_away(namespace, kube)

    async def _take_away(self, namespace: str, kube: Kube) -> None:
        refs = [Ref("networking.k8s.io/v1", "NetworkPolicy", namespace, NETWORK_POLICY)]
        if namespace != self._config.namespace:
            refs.append(Ref("v1", "Secret", namespace, labels.ADMIN_SECRET))
        for ref in refs:
            live = await kube.get(ref)
            is_ours = live and live["metadata"].get("labels", {}).get(labels.MANAGED_BY)
            if live and is_ours == labels.OPERATOR:
                await kube.delete(live)

    async def _token(self, kube: Kube) -> str:
        name, namespace = self._config.admin_secret, self._config.namespace
        ref = Ref("v1", "Secret", namespace, name)
        secret = kube.store.get(ref) or await kube.get(ref)
        encoded = ((secret or {}).get("data") or {}).get(labels.ADMIN_TOKEN_KEY)
        if not encoded:
            raise AdminTokenMissingError(name=name, namespace=namespace)
        return base64.b64decode(encoded).decode()
