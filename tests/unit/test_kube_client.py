"""The API client: writes only what changes something, and says what went wrong."""

from typing import Any

import pytest

from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import Ref, collection_path, object_path, plural
from mizzen.operator.kube.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Invalid,
    KubeError,
    NotFound,
    QuotaExceeded,
    Throttled,
    Unauthorized,
    Unavailable,
    error_from,
)
from mizzen.operator.kube.events import Event
from mizzen.operator.kube.intent import HASH_ANNOTATION, covers, hash_of, stamp
from mizzen.operator.kube.relist import Followed, relist
from mizzen.operator.kube.store import Store
from mizzen.operator.routing import route

Json = dict[str, Any]
FOLLOWED = (Followed("v1", "Service", "managed=yes"),)


class Server:
    """Keeps objects by path, counts writes, and can refuse the next request."""

    def __init__(self) -> None:
        self.objects: dict[str, Json] = {}
        self.writes: list[tuple[str, str, Json]] = []
        self.reads: list[tuple[str, dict[str, str]]] = []
        self.version = 0
        self.next_error: KubeError | None = None

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
        timeout_s: float = 30.0,
    ) -> Json:
        if self.next_error is not None:
            error, self.next_error = self.next_error, None
            raise error
        if method == "GET":
            self.reads.append((path, dict(query or {})))
            return self._read(path, query or {})
        assert body is not None
        self.writes.append((method, path, body))
        self.version += 1
        return getattr(self, f"_{method.lower()}")(path, body)  # type: ignore[no-any-return]

    def _read(self, path: str, query: dict[str, str]) -> Json:
        if path in self.objects:
            return self.objects[path]
        plural_ = path.rpartition("/")[2]
        found = [value for key, value in sorted(self.objects.items()) if f"/{plural_}/" in key]
        if "limit" not in query:
            raise NotFound(status=404)
        start, size = int(query.get("continue", 0)), int(query["limit"])
        metadata: Json = {"resourceVersion": str(self.version)}
        if start + size < len(found):
            metadata["continue"] = str(start + size)
        return {"metadata": metadata, "items": found[start : start + size]}

    def _patch(self, path: str, body: Json) -> Json:
        path = path.removesuffix("/status")
        known = self.objects.get(path, {})
        metadata = {**known.get("metadata", {}), **body.get("metadata", {})}
        live = {**known, **body, "metadata": metadata}
        return self._store(path, live)

    def _post(self, path: str, body: Json) -> Json:
        path = f"{path}/{body['metadata']['name']}"
        if path in self.objects:
            raise AlreadyExists(status=409)
        return self._store(path, body)

    def _delete(self, path: str, body: Json) -> Json:
        if path not in self.objects:
            raise NotFound(status=404)
        live = self.objects[path]
        if body["preconditions"]["uid"] != live["metadata"]["uid"]:
            raise Conflict(status=409)
        del self.objects[path]
        return {"kind": "Status", "metadata": {}}

    def _store(self, path: str, live: Json) -> Json:
        metadata = {"uid": f"uid-{self.version}", **live["metadata"]}
        metadata["resourceVersion"] = str(self.version)
        self.objects[path] = {**live, "metadata": metadata}
        return self.objects[path]


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def kube(server: Server) -> Kube:
    return Kube(server, Store(route), listed=frozenset({"Service", "LLMDeployment", "Pod"}))


def service(**spec: Any) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "smollm2",
            "namespace": "default",
            "labels": {"mizzen.dev/deployment": "smollm2"},
        },
        "spec": {"ports": [{"name": "http", "port": 8000}], **spec},
    }


def resource(**status: Any) -> Json:
    return {
        "apiVersion": "mizzen.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {
            "name": "smollm2",
            "namespace": "default",
            "uid": "u1",
            "resourceVersion": "1",
        },
        "spec": {},
        **({"status": status} if status else {}),
    }


async def test_the_same_intent_is_written_once(kube: Kube, server: Server) -> None:
    for _ in range(100):
        await kube.apply(service())
    assert len(server.writes) == 1


async def test_a_restarted_operator_writes_nothing(kube: Kube, server: Server) -> None:
    await kube.apply(service())
    again = Kube(server, Store(route), listed=kube.listed)
    await relist(again, FOLLOWED)
    await again.apply(service())
    assert len(server.writes) == 1


async def test_what_the_server_adds_is_no_difference(kube: Kube, server: Server) -> None:
    live = await kube.apply(service())
    live["spec"]["clusterIP"] = "10.0.0.1"
    live["spec"]["ports"][0]["protocol"] = "TCP"
    await relist(kube, FOLLOWED)
    await kube.apply(service())
    assert len(server.writes) == 1


async def test_a_foreign_edit_of_our_field_is_put_right(kube: Kube, server: Server) -> None:
    await kube.apply(service())
    edited = {**server.objects["/api/v1/namespaces/default/services/smollm2"]}
    server.version += 1
    edited["spec"] = {"ports": [{"name": "http", "port": 9999}]}
    edited["metadata"] = {**edited["metadata"], "resourceVersion": str(server.version)}
    kube.store.put(edited)
    await kube.apply(service())
    assert len(server.writes) == 2


async def test_a_field_we_no_longer_want_is_a_difference(kube: Kube, server: Server) -> None:
    await kube.apply(service(sessionAffinity="ClientIP"))
    await kube.apply(service())
    assert len(server.writes) == 2


async def test_a_kind_that_is_not_watched_is_read_before_it_is_written(server: Server) -> None:
    await Kube(server, Store(route), listed=frozenset({"Service"})).apply(service())
    kube = Kube(server, Store(route), listed=frozenset())
    await kube.apply(service())
    await kube.apply(service())
    assert len(server.writes) == 1
    assert len(server.reads) == 1


async def test_a_write_is_seen_by_the_next_decision(kube: Kube) -> None:
    live = await kube.apply(service())
    stored = kube.store.get(Ref.of(service()))
    assert stored is not None
    assert stored["metadata"]["uid"] == live["metadata"]["uid"]


async def test_an_equal_status_is_not_written(kube: Kube, server: Server) -> None:
    kube.store.put(resource())
    server.version = 1
    for _ in range(3):
        await kube.apply_status(resource(), {"phase": "Ready"})
    assert len(server.writes) == 1
    assert server.writes[0][2]["metadata"]["uid"] == "u1"


async def test_others_hear_of_a_written_status(server: Server) -> None:
    heard: list[Json] = []
    kube = Kube(server, Store(route), on_status=heard.append)
    await kube.apply_status(resource(), {"phase": "Ready"})
    await kube.apply_status(resource(), {"phase": "Ready"})
    assert [document["status"] for document in heard] == [{"phase": "Ready"}]


async def test_a_pod_that_exists_already_is_taken_as_made(kube: Kube, server: Server) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": "default"},
        "spec": {},
    }
    made = await kube.create(pod)
    again = await kube.create(pod)
    assert again["metadata"]["uid"] == made["metadata"]["uid"]


async def test_only_the_object_that_was_looked_at_is_deleted(kube: Kube, server: Server) -> None:
    live = await kube.apply(service())
    stranger = {**live, "metadata": {**live["metadata"], "uid": "another"}}
    with pytest.raises(Conflict):
        await kube.delete(stranger)
    await kube.delete(live)
    assert kube.store.get(Ref.of(live)) is None


async def test_deleting_what_is_gone_is_fine(kube: Kube, server: Server) -> None:
    live = await kube.apply(service())
    server.objects.clear()
    await kube.delete(live)
    assert kube.store.get(Ref.of(live)) is None


async def test_a_failed_list_removes_nothing(kube: Kube, server: Server) -> None:
    await kube.apply(service())
    server.next_error = Unavailable()
    with pytest.raises(Unavailable):
        await relist(kube, FOLLOWED)
    assert kube.store.get(Ref.of(service())) is not None


async def test_lists_are_read_in_chunks(kube: Kube, server: Server) -> None:
    for number in range(7):
        document = service()
        document["metadata"]["name"] = f"s{number}"
        await kube.apply(document)
    server.reads.clear()
    found = [
        item["metadata"]["name"]
        async for page in kube.pages("v1", "Service", chunk_size=3)
        for item in page.items
    ]
    assert found == [f"s{number}" for number in range(7)]
    assert len(server.reads) == 3


async def test_the_same_news_again_counts_up(kube: Kube, server: Server) -> None:
    event = Event(
        about=resource(), reason="Ready", message="Serves.", is_warning=False, at="2026-01-01"
    )
    for _ in range(3):
        await kube.create_event(event)
    events = [value for key, value in server.objects.items() if "/events/" in key]
    assert [one["count"] for one in events] == [3]
    assert events[0]["involvedObject"]["name"] == "smollm2"


COVERS: dict[str, tuple[Any, Any, bool]] = {
    "an equal value": (1, 1, True),
    "a further field of somebody else": ({"a": 1, "b": 2}, {"a": 1}, True),
    "a missing field": ({"b": 2}, {"a": 1}, False),
    "a named element among others": (
        [{"name": "x", "v": 1}, {"name": "y"}],
        [{"name": "x", "v": 1}],
        True,
    ),
    "named elements in another order": (
        [{"name": "y"}, {"name": "x"}],
        [{"name": "x"}, {"name": "y"}],
        True,
    ),
    "a changed named element": ([{"name": "x", "v": 2}], [{"name": "x", "v": 1}], False),
    "plain values in another order": (["b", "a"], ["a", "b"], False),
    "an empty map the server dropped": (None, {}, True),
    "an empty list the server dropped": (None, [], True),
    "a false the server left out": (None, False, True),
    "a false that somebody made true": (True, False, False),
    "a value that somebody took away": (None, 8000, False),
}  # fmt: skip


@pytest.mark.parametrize(("live", "intended", "expected"), COVERS.values(), ids=COVERS)
def test_covers(live: Any, intended: Any, expected: bool) -> None:
    assert covers(live, intended) is expected


def test_the_stamp_does_not_depend_on_the_order_of_keys() -> None:
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1})
    assert HASH_ANNOTATION in stamp(service())["metadata"]["annotations"]
    assert "annotations" not in service()["metadata"]


ANSWERS: dict[str, tuple[int, Json, type[KubeError], bool]] = {
    "409 is decided again": (409, {}, Conflict, True),
    "409 of a create": (409, {"reason": "AlreadyExists"}, AlreadyExists, True),
    "403": (403, {}, Forbidden, True),
    "403 of a quota": (403, {"message": "pods is forbidden: exceeded quota"}, QuotaExceeded, True),
    "404": (404, {}, NotFound, True),
    "401": (401, {}, Unauthorized, True),
    "422 waits for another spec": (422, {}, Invalid, False),
    "429": (429, {}, Throttled, True),
    "500": (500, {}, Unavailable, True),
    "503": (503, {}, Unavailable, True),
}


@pytest.mark.parametrize(("status", "body", "kind", "retry"), ANSWERS.values(), ids=ANSWERS)
def test_answer(status: int, body: Json, kind: type[KubeError], retry: bool) -> None:
    error = error_from(status, body)
    assert type(error) is kind
    assert error.retry is retry
    assert str(error).endswith(".")


def test_an_error_names_fields_and_no_objects_so_that_conditions_do_not_flap() -> None:
    body = {
        "message": 'Pod "smollm2-x7f-0-0" is invalid at 12:01',
        "details": {"causes": [{"field": "spec.containers[0].image", "message": "Required"}]},
    }
    error = str(error_from(422, body))
    assert "spec.containers[0].image: Required" in error
    assert "smollm2-x7f-0-0" not in error


def test_patience_is_as_long_as_the_server_asks() -> None:
    error = error_from(429, {}, retry_after="7")
    assert isinstance(error, Throttled)
    assert error.retry_after_s == 7


PLURALS = {
    "Pod": "pods",
    "NetworkPolicy": "networkpolicies",
    "Ingress": "ingresses",
    "Endpoints": "endpoints",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "EndpointSlice": "endpointslices",
    "Lease": "leases",
}


@pytest.mark.parametrize(("kind", "expected"), PLURALS.items(), ids=PLURALS)
def test_plural(kind: str, expected: str) -> None:
    assert plural(kind) == expected


def test_paths() -> None:
    assert collection_path("v1", "Pod") == "/api/v1/pods"
    ref = Ref("policy/v1", "PodDisruptionBudget", "d", "x")
    expected = "/apis/policy/v1/namespaces/d/poddisruptionbudgets/x/status"
    assert object_path(ref, "status") == expected
