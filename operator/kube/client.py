"""The operator's few calls to the API server.

Reads come from the store where a moment's delay is harmless; `get` and `list` ask the server.
Writes are left out when the store shows that they would change nothing, and their answers go into
the store, so that the next decision sees them. Must not know what the objects mean.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mizzen.operator.kube.documents import (
    Json,
    Ref,
    collection_path,
    object_path,
    uid_of,
    version_of,
)
from mizzen.operator.kube.errors import AlreadyExists, NotFound
from mizzen.operator.kube.events import Event, first_event, repeat_event
from mizzen.operator.kube.intent import covers, stamp
from mizzen.operator.kube.store import Store
from mizzen.operator.kube.transport import APPLY, MERGE, STRATEGIC, Transport

OPERATOR = "mizzen-operator"
STATUS = "mizzen-status"


class WriteObserver(Protocol):
    """Gets told about writes; telemetry implements it."""

    def wrote(self, kind: str, outcome: str) -> None:
        """A write of this kind was applied, created, skipped, deleted or failed."""


class _Silent:
    def wrote(self, kind: str, outcome: str) -> None:
        pass


def _ignore(_: Json) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Listing:
    """A kind's objects as of one version of the cluster."""

    items: list[Json]
    version: int


@dataclass(slots=True)
class Kube:
    """Calls for one cluster."""

    transport: Transport
    store: Store
    # Kinds the store has all objects of; of others it has what was read or written.
    listed: frozenset[str] = frozenset()
    # Called after a status write: its echo is no news, yet others may look at that status.
    on_status: Callable[[Json], None] = _ignore
    observer: WriteObserver = field(default_factory=_Silent)

    async def get(self, ref: Ref) -> Json | None:
        """Return the object as the API server has it now, or None where there is none."""
        try:
            live = await self.transport.request("GET", object_path(ref))
        except NotFound:
            if ref.kind not in self.listed:
                self.store.forget(ref)  # no event tells that it went, with its namespace perhaps
            return None
        self.store.put(live)
        return live

    async def look_at(self, path: str) -> Json | None:
        """Return what is at a URL path, None where there is nothing; the store keeps none of it."""
        try:
            return await self.transport.request("GET", path)
        except NotFound:
            return None

    async def list(
        self, api_version: str, kind: str, *, namespace: str = "", label_selector: str = ""
    ) -> Listing:
        """Return all objects of a kind, consistent as of one version."""
        items: list[Json] = []
        version = 0
        async for page in self.pages(
            api_version, kind, namespace=namespace, label_selector=label_selector
        ):
            items += page.items
            version = page.version
        return Listing(items, version)

    async def pages(
        self,
        api_version: str,
        kind: str,
        *,
        namespace: str = "",
        label_selector: str = "",
        chunk_size: int = 250,
    ) -> AsyncIterator[Listing]:
        """Yield a kind's objects in chunks, all as of one version: whole lists need much memory."""
        query = {"limit": str(chunk_size)}
        if label_selector:
            query["labelSelector"] = label_selector
        path = collection_path(api_version, kind, namespace)
        while True:
            page = await self.transport.request("GET", path, query=query)
            # Elements of a list come without their kind.
            items = [{"apiVersion": api_version, "kind": kind, **item} for item in page["items"]]
            yield Listing(items, version_of(page))
            if not (token := page["metadata"].get("continue")):
                return
            query["continue"] = token

    async def apply(self, intent: Json) -> Json:
        """Make the object say what the intent says, and return it as it is now.

        The intent holds every field we own, each time: one that is left out is removed.
        """
        stamped = stamp(intent)
        ref = Ref.of(intent)
        live = self.store.get(ref)
        if live is None and ref.kind not in self.listed:
            live = await self.get(ref)
        if live is not None and covers(live, stamped):
            self.observer.wrote(ref.kind, "skipped")
            return live
        query = {"fieldManager": OPERATOR, "force": "true"}
        return await self._write("PATCH", object_path(ref), ref, stamped, APPLY, query)

    async def create(self, document: Json) -> Json:
        """Create an object that never changes afterwards, such as a pod.

        Where one of this name exists already it is returned: somebody, or an operator that
        died in between, was quicker.
        """
        ref = Ref.of(document)
        path = collection_path(ref.api_version, ref.kind, ref.namespace)
        query = {"fieldManager": OPERATOR}
        try:
            return await self._write("POST", path, ref, document, "application/json", query)
        except AlreadyExists:
            if (live := await self.get(ref)) is None:
                raise
            return live

    async def apply_status(self, resource: Json, status: Json, *, apart: str = "") -> Json:
        """Write the resource's status unless it says so already; return the resource.

        `apart` names a field of the status that `apply_status_field` writes: it stays as it is.

        Raises:
            Conflict: the resource was deleted and made anew meanwhile.
        """
        ref = Ref.of(resource)
        live = self.store.get(ref) or resource
        known = {k: v for k, v in (live.get("status") or {}).items() if k != apart}
        if known == status and uid_of(live) == uid_of(resource):
            self.observer.wrote(ref.kind, "skipped")
            return live
        return await self._apply_status(resource, status, manager=STATUS)

    async def apply_status_field(self, resource: Json, field: str, value: Json | None) -> Json:
        """Write one field of the status under a manager of its own; None takes it away.

        So two parts of the operator write one status, and neither undoes what the other says.

        Raises:
            Conflict: the resource was deleted and made anew meanwhile.
        """
        status = {} if value is None else {field: value}
        return await self._apply_status(resource, status, manager=f"mizzen-{field}")

    async def _apply_status(self, resource: Json, status: Json, *, manager: str) -> Json:
        ref = Ref.of(resource)
        body = {
            "apiVersion": ref.api_version,
            "kind": ref.kind,
            "metadata": {"name": ref.name, "namespace": ref.namespace, "uid": uid_of(resource)},
            "status": status,
        }
        query = {"fieldManager": manager, "force": "true"}
        path = object_path(ref, "status")
        written = await self._write("PATCH", path, ref, body, APPLY, query)
        self.on_status(written)
        return written

    async def apply_condition(self, pod: Json, condition: Json) -> Json:
        """Set one condition in a pod's status, leaving the kubelet's alone.

        `condition` is a whole one: type, status, lastTransitionTime, reason and message.
        """
        ref = Ref.of(pod)
        body = {"metadata": {"uid": uid_of(pod)}, "status": {"conditions": [condition]}}
        query = {"fieldManager": OPERATOR}
        path = object_path(ref, "status")
        return await self._write("PATCH", path, ref, body, STRATEGIC, query)

    async def annotate(
        self,
        document: Json,
        annotations: Mapping[str, str | None],
        *,
        labels: Mapping[str, str | None] | None = None,
    ) -> Json:
        """Set annotations, and labels with them, of an existing object; None removes one."""
        ref = Ref.of(document)
        metadata = {"uid": uid_of(document), "annotations": annotations}
        body = {"metadata": metadata | ({"labels": labels} if labels else {})}
        query = {"fieldManager": OPERATOR}
        return await self._write("PATCH", object_path(ref), ref, body, MERGE, query)

    async def let_schedule(self, pod: Json, gate: str, *, hostname: str | None = None) -> Json:
        """Take one of a pod's scheduling gates away; with `hostname`, bind it to that node.

        Raises:
            Conflict: the pod changed since it was read, another gate of it perhaps.
        """
        ref, query = Ref.of(pod), {"fieldManager": OPERATOR}
        gates = [g for g in pod["spec"].get("schedulingGates") or [] if g["name"] != gate]
        spec: Json = {"schedulingGates": gates or None}
        if hostname:
            # With the gate and not before it: a pod that is bound but held back would be neither
            # waiting nor on its way. The API server allows a selector until the last gate is gone.
            spec["nodeSelector"] = {"kubernetes.io/hostname": hostname}
        metadata = {"uid": uid_of(pod), "resourceVersion": pod["metadata"]["resourceVersion"]}
        body = {"metadata": metadata, "spec": spec}
        return await self._write("PATCH", object_path(ref), ref, body, MERGE, query)

    async def delete(
        self, document: Json, *, grace_s: int | None = None, check_version: bool = True
    ) -> None:
        """Delete exactly the object that was looked at; one that is gone already is fine.

        Raises:
            Conflict: it changed since, so the decision has to be made again.
        """
        ref = Ref.of(document)
        preconditions = {"uid": uid_of(document)}
        if check_version:
            preconditions["resourceVersion"] = document["metadata"]["resourceVersion"]
        body: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": preconditions,
            "propagationPolicy": "Background",
        }
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            answer = await self.transport.request("DELETE", object_path(ref), body=body)
        except NotFound:
            self.store.remove(document)
            return
        self.observer.wrote(ref.kind, "deleted")
        # A pod with a grace period lives on, marked; anything else is gone now.
        if answer.get("kind") == ref.kind and "deletionTimestamp" in answer["metadata"]:
            self.store.put(answer)
        else:
            self.store.remove(document)

    async def create_event(self, event: Event) -> None:
        """Tell people about a flipped condition; the same news again counts up."""
        first = first_event(event)
        ref = Ref.of(first)
        path = collection_path(ref.api_version, ref.kind, ref.namespace)
        try:
            await self.transport.request("POST", path, body=first)
        except AlreadyExists:
            live = await self.transport.request("GET", object_path(ref))
            body = repeat_event(live, event)
            await self.transport.request("PATCH", object_path(ref), body=body, content_type=MERGE)

    async def _write(
        self, method: str, path: str, ref: Ref, body: Json, content_type: str, query: dict[str, str]
    ) -> Json:
        try:
            live = await self.transport.request(
                method, path, query=query, body=body, content_type=content_type
            )
        except Exception:
            self.observer.wrote(ref.kind, "failed")
            raise
        self.observer.wrote(ref.kind, "created" if method == "POST" else "applied")
        self.store.put(live)
        return live
