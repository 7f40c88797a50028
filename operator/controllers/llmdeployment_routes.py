"""Keeps a deployment's InferencePool and HTTPRoute as wanted, apart from what it takes to serve."""

from __future__ import annotations

import contextlib
import logging
from datetime import datetime

from mizzen.operator.crds.common import Json
from mizzen.operator.desired import labels
from mizzen.operator.desired.routes import build_routes
from mizzen.operator.desired.serving import Serving
from mizzen.operator.engine.key import Key
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import Ref, labels_of
from mizzen.operator.kube.errors import AlreadyExists, KubeError
from mizzen.operator.kube.events import Event
from mizzen.operator.status.conditions import rfc3339
from mizzen.operator.status.reasons import Reason

logger = logging.getLogger(__name__)


async def bring_routes(
    key: Key, resource: Json, serving: Serving, *, kube: Kube, facts: Facts, now: datetime
) -> bool:
    """Write and remove what it takes; return whether all is as wanted.

    Trouble is told by an Event and no condition, and holds nothing up: the model serves all the
    same. Events are as rare as looks at the Gateway API, however often a reconcile comes by.
    """
    try:
        await _bring(key, serving, kube, facts)
    except KubeError as error:
        if key not in facts.gateway_api.told:
            facts.gateway_api.told.add(key)
            await _tell(key, resource, error, kube, now)
        return False
    return True


async def _tell(key: Key, resource: Json, error: KubeError, kube: Kube, now: datetime) -> None:
    logger.warning("cannot write a route", extra={"key": str(key), "error": str(error)})
    event = Event(
        about=resource,
        reason=Reason.ROUTE_NOT_WRITTEN.value,
        message=str(error),
        is_warning=True,
        at=rfc3339(now),
    )
    with contextlib.suppress(KubeError):  # the log has it
        await kube.create_event(event)


async def _bring(key: Key, serving: Serving, kube: Kube, facts: Facts) -> None:
    routing = facts.gateway_api.routing
    wanted = build_routes(serving, routing)
    for document in wanted:
        await _apply(document, kube)
    # After that: until then the route may lead to the pool.
    kept = {document["kind"] for document in wanted}
    for kind in routing.kinds - kept:
        for child in facts.store.children(key, kind):
            if _is_ours(child):
                # Gateways write its status all the time, so its version is of no meaning.
                await kube.delete(child, check_version=False)


async def _apply(document: Json, kube: Kube) -> None:
    """Apply it, unless that would take over what somebody else made under this name.

    Raises:
        AlreadyExists: there is such an object, and it is not the operator's.
    """
    ref = Ref.of(document)
    live = kube.store.get(ref) or await kube.get(ref)
    if live is not None and not _is_ours(live):
        raise AlreadyExists(
            f"There is an {ref.kind} with this deployment's name that the operator has not made. "
            "Rename or delete it."
        )
    await kube.apply(document)


def _is_ours(document: Json) -> bool:
    return labels_of(document).get(labels.MANAGED_BY) == labels.OPERATOR
