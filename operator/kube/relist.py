"""Reads everything we follow again and puts the store right: the cure for missed events."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mizzen.operator.engine.key import Key
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import Ref


@dataclass(frozen=True, slots=True)
class Followed:
    """A kind that is watched and listed; `selector` narrows it by label."""

    api_version: str
    kind: str
    selector: str = ""


async def relist(
    kube: Kube, followed: Iterable[Followed], *, namespaces: Sequence[str] = ()
) -> set[Key]:
    """Bring the store up to date; return the keys of everything that was not as known."""
    concerned: set[Key] = set()
    for kind in followed:
        for namespace in namespaces or ("",):
            concerned |= await relist_kind(kube, kind, namespace)
    kube.store.drop_except(kube.listed)
    return concerned


async def relist_kind(kube: Kube, followed: Followed, namespace: str) -> set[Key]:
    """Bring the store up to date on one kind, in one namespace or everywhere.

    Raises:
        NotFound: the API server does not know the kind.
    """
    concerned: set[Key] = set()
    present: set[Ref] = set()
    version = 0
    pages = kube.pages(
        followed.api_version, followed.kind, namespace=namespace, label_selector=followed.selector
    )
    async for page in pages:
        version = page.version
        for document in page.items:
            present.add(Ref.of(document))
            concerned |= kube.store.put(document)
    concerned |= kube.store.prune(
        followed.kind, present, version=version, namespace=namespace or None
    )
    return concerned
