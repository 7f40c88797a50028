"""Finds other autoscalers that drive a deployment which already scales by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta

from mizzen.operator.crds import llmdeployment
from mizzen.operator.crds.common import GROUP, Json
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.errors import KubeError, NotFound

logger = logging.getLogger(__name__)

_ASK_EVERY = timedelta(seconds=30)
_SCALERS = (
    ("autoscaling/v2", "HorizontalPodAutoscaler"),
    ("keda.sh/v1alpha1", "ScaledObject"),  # an unknown kind where KEDA is not installed
)
Name = tuple[str, str]


class Rivals:
    """The deployments that another scaler targets, asked for now and then."""

    def __init__(self, namespaces: Sequence[str]) -> None:
        self._namespaces = namespaces or ("",)
        self._found: dict[Name, str] = {}
        self._asked_at: datetime | None = None

    async def find(self, kube: Kube, *, now: datetime) -> Mapping[Name, str]:
        """Return by deployment who else scales it, such as "HorizontalPodAutoscaler web"."""
        if self._asked_at is not None and now - self._asked_at < _ASK_EVERY:
            return self._found
        self._asked_at = now
        try:
            self._found = {
                name: rival
                for api_version, kind in _SCALERS
                for namespace in self._namespaces
                for name, rival in _rivals(await _list(kube, api_version, kind, namespace))
            }
        except KubeError as error:
            # What was known stays: a blink of the API server must not let two scalers fight.
            logger.warning("cannot look for other autoscalers", extra={"error": str(error)})
        return self._found


async def _list(kube: Kube, api_version: str, kind: str, namespace: str) -> list[Json]:
    try:
        return (await kube.list(api_version, kind, namespace=namespace)).items
    except NotFound:
        return []


def _rivals(scalers: Iterable[Json]) -> Iterable[tuple[Name, str]]:
    for scaler in scalers:
        target = (scaler.get("spec") or {}).get("scaleTargetRef") or {}
        is_ours = str(target.get("apiVersion") or "").startswith(f"{GROUP}/")
        if is_ours and target.get("kind") == llmdeployment.KIND:
            metadata = scaler["metadata"]
            yield (
                (metadata["namespace"], str(target.get("name"))),
                f"{scaler['kind']} {metadata['name']}",
            )
