"""Kubernetes events become store entries and work-queue keys; the only file with @kopf decorators.

Must not know what an event means: that is found out later, from the whole state.
"""

from dataclasses import dataclass
from typing import Any, Self

import kopf

from mizzen.operator.crds import finetunejob, llmdeployment
from mizzen.operator.crds.common import API_VERSION
from mizzen.operator.engine.workqueue import WorkQueue
from mizzen.operator.informer import configure_kopf
from mizzen.operator.kube.connect import load_credentials
from mizzen.operator.kube.documents import Json, plural
from mizzen.operator.kube.relist import Followed
from mizzen.operator.kube.store import Store
from mizzen.operator.routing import CHILD_SELECTOR, neighbours
from mizzen.operator.specs import SpecCache

RESOURCES = (
    Followed(API_VERSION, llmdeployment.KIND),
    Followed(API_VERSION, finetunejob.KIND),
)
CHILDREN = tuple(
    Followed(api_version, kind, CHILD_SELECTOR)
    for api_version, kind in (
        ("v1", "Pod"),
        ("v1", "Service"),
        ("v1", "ConfigMap"),
        ("policy/v1", "PodDisruptionBudget"),
        ("apps/v1", "ControllerRevision"),
        ("networking.k8s.io/v1", "NetworkPolicy"),
    )
)
FOLLOWED = RESOURCES + CHILDREN

# A replica's pods change together: a short wait makes the burst one reconcile.
CHILD_DELAY_S = 0.2


@dataclass(frozen=True, slots=True)
class Memo:
    """What handlers need; Kopf would copy it for every object."""

    store: Store
    queue: WorkQueue
    specs: SpecCache

    def __copy__(self) -> Self:
        return self


def note(kind: str | None, document: Json, memo: Memo) -> None:
    """Take in one watch event and make the keys it concerns due."""
    is_gone = kind == "DELETED"
    concerned = memo.store.remove(document) if is_gone else memo.store.put(document)
    if not concerned:
        return
    if document["kind"] not in (llmdeployment.KIND, finetunejob.KIND):
        for key in concerned:
            memo.queue.add(key, CHILD_DELAY_S)
        return
    if is_gone:
        memo.specs.forget(document)
    for key in concerned | set(neighbours(document, memo.store)):
        memo.queue.add(key)


@kopf.on.login()
async def login(**_: object) -> kopf.ConnectionInfo:
    """Log in as our own client does, instead of by whatever library Kopf finds."""
    found = await load_credentials()
    return kopf.ConnectionInfo(
        server=found.server,
        ca_path=found.ca_path,
        certificate_path=found.certificate_path,
        private_key_path=found.private_key_path,
        scheme="Bearer" if found.token else None,
        token=found.token,
        insecure=found.insecure,
        expiration=found.expires_at,
    )


@kopf.on.startup()
async def startup(settings: kopf.OperatorSettings, **_: object) -> None:
    """Configure Kopf as an informer."""
    configure_kopf(settings)
    for child in CHILDREN:
        group, _slash, version = child.api_version.rpartition("/")
        settings.watching.label_selectors[group, version, plural(child.kind)] = child.selector


async def on_event(event: dict[str, Any], memo: Memo, **_: object) -> None:
    """Hand one watch event on."""
    note(event["type"], event["object"], memo)


for _followed in FOLLOWED:
    kopf.on.event(_followed.api_version, plural(_followed.kind))(on_event)  # type: ignore[arg-type]
