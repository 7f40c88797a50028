"""Finds the gateways of this installation, for the operator to scrape them itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.errors import KubeError

logger = logging.getLogger(__name__)

SELECTOR = "app.kubernetes.io/name=mizzen,app.kubernetes.io/component=gateway"
_ASK_EVERY_S = 10.0


class Gateways:
    """The addresses of the gateway pods beside the operator, asked for now and then."""

    def __init__(self, kube: Kube, namespace: str, clock: Callable[[], float]) -> None:
        self._kube = kube
        self._namespace = namespace
        self._clock = clock
        self._asked_at: float | None = None
        self._found: tuple[str, ...] | None = None

    async def __call__(self) -> Sequence[str] | None:
        """Return their addresses; None before the first answer of the API server."""
        now = self._clock()
        if self._asked_at is not None and now - self._asked_at < _ASK_EVERY_S:
            return self._found
        try:
            listing = await self._kube.list(
                "v1", "Pod", namespace=self._namespace, label_selector=SELECTOR
            )
        except KubeError as error:
            logger.warning("cannot look for gateways", extra={"error": str(error)})
            return self._found
        self._asked_at = now
        self._found = tuple(
            sorted(
                pod["status"]["podIP"]
                for pod in listing.items
                if pod.get("status", {}).get("phase") == "Running"
                and pod["status"].get("podIP")
                and "deletionTimestamp" not in pod["metadata"]
            )
        )
        return self._found
