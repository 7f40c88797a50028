"""Which of the Gateway API's kinds the cluster has, and our objects of them.

Their CRDs are somebody else's: they may be missing, come, and go while we run. A watch on a kind
that may not exist would be one more thing to keep alive, so they are listed now and then.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from mizzen.operator.config import OperatorConfig
from mizzen.operator.crds import llmdeployment
from mizzen.operator.desired.routes import (
    API_VERSIONS,
    EndpointPicker,
    GatewayRouting,
    ParentGateway,
)
from mizzen.operator.engine.key import Key
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import Ref
from mizzen.operator.kube.errors import KubeError, NotFound
from mizzen.operator.kube.relist import Followed, relist_kind
from mizzen.operator.routing import CHILD_SELECTOR, route

logger = logging.getLogger(__name__)


class GatewayApi:
    """What reconciles may make of the Gateway API, as of the last look."""

    def __init__(self, config: OperatorConfig) -> None:
        self._namespaces = config.watch_namespaces or [""]
        self.told: set[Key] = set()  # whose trouble with routes was told since the last look
        self.routing = GatewayRouting(gateway=_gateway(config), picker=_picker(config))

    async def look(self, kube: Kube) -> set[Key]:
        """See what is there now; return the deployments whose routes may have to change."""
        self.told.clear()
        concerned: set[Key] = set()
        for kind, api_version in API_VERSIONS.items():
            try:
                concerned |= await self._look_at(Followed(api_version, kind, CHILD_SELECTOR), kube)
            except KubeError as error:
                # What was known stays: a blink of the API server must not take a route away.
                extra = {"kind": kind, "error": str(error)}
                logger.warning("cannot look at a kind of the Gateway API", extra=extra)
        return concerned

    async def _look_at(self, followed: Followed, kube: Kube) -> set[Key]:
        kind = followed.kind
        concerned: set[Key] = set()
        try:
            for namespace in self._namespaces:
                concerned |= await relist_kind(kube, followed, namespace)
            kinds = self.routing.kinds | {kind}
        except NotFound:
            kinds = self.routing.kinds - {kind}
            for gone in kube.store.all(kind):
                kube.store.forget(Ref.of(gone))
        if kinds != self.routing.kinds:
            self.routing = replace(self.routing, kinds=kinds)
            concerned |= {key for each in kube.store.all(llmdeployment.KIND) for key in route(each)}
        return concerned


def _gateway(config: OperatorConfig) -> ParentGateway | None:
    if not config.parent_gateway:
        return None
    return ParentGateway(
        config.parent_gateway, config.parent_gateway_namespace, config.parent_gateway_section
    )


def _picker(config: OperatorConfig) -> EndpointPicker | None:
    if not config.endpoint_picker:
        return None
    return EndpointPicker(config.endpoint_picker, config.endpoint_picker_port)
