"""A watch that breaks in every way an API server knows, and what is still known meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from hack.ports import free_port
from mizzen.runtime.gateway import reflector as reflector_module
from mizzen.runtime.gateway.kube import KubeClient, KubeError, KubeObject
from mizzen.runtime.gateway.reflector import Reflector

PATH = "/apis/example/v1/things"


def thing(name: str, version: int) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "n", "resourceVersion": str(version)}}


class Names:
    """A sink that remembers names."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def replace(self, items: Sequence[KubeObject]) -> None:
        self.names = {item["metadata"]["name"] for item in items}

    def put(self, item: KubeObject) -> None:
        self.names.add(item["metadata"]["name"])

    def drop(self, item: KubeObject) -> None:
        self.names.discard(item["metadata"]["name"])


@dataclass
class ApiServer:
    """An API server of one kind, whose answers to watches are scripted."""

    things: list[dict[str, Any]] = field(default_factory=list)
    version: int = 10
    watches: list[list[str] | int] = field(default_factory=list)
    list_status: int = 200
    # What is there once the server has forgotten the past.
    later: list[dict[str, Any]] | None = None
    asked: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    port: int = field(default_factory=free_port)  # the same one when it comes back
    _runner: web.ServerRunner | None = None

    async def start(self) -> None:
        server = web.Server(self._answer, handler_cancellation=True)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.url = f"http://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    @property
    def lists(self) -> list[dict[str, str]]:
        return [query for query in self.asked if "watch" not in query]

    @property
    def watched_from(self) -> list[str]:
        return [query["resourceVersion"] for query in self.asked if "watch" in query]

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        query = dict(request.query)
        self.asked.append(query)
        if "watch" not in query:
            return self._list(query)
        script = self.watches.pop(0) if self.watches else ["hang"]
        if self.later is not None and "410" in json.dumps(script):
            self.things, self.version = self.later, 30
        if isinstance(script, int):
            return web.json_response({"code": script, "message": "no"}, status=script)
        answer = web.StreamResponse()
        await answer.prepare(request)
        for line in script:
            if line == "hang":
                await asyncio.Event().wait()
            elif line == "reset":
                assert request.transport is not None
                request.transport.abort()
                return answer
            else:
                await answer.write(line.encode())
        await answer.write_eof()
        return answer

    def _list(self, query: dict[str, str]) -> web.Response:
        if self.list_status != 200:
            return web.json_response({"message": "not now"}, status=self.list_status)
        start = int(query.get("continue", 0))
        page = self.things[start : start + 2]
        metadata = {"resourceVersion": str(self.version)}
        if start + 2 < len(self.things):
            metadata["continue"] = str(start + 2)
        return web.json_response({"metadata": metadata, "items": page})


def event(kind: str, item: dict[str, Any]) -> str:
    return json.dumps({"type": kind, "object": item}) + "\n"


@dataclass
class Mirror:
    """A reflector at work on a server."""

    server: ApiServer
    sink: Names
    reflector: Reflector
    task: asyncio.Task[None]


@pytest.fixture
async def mirror(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    monkeypatch.setattr(reflector_module, "_BACKOFF_LAST_S", 0.02)
    made: list[tuple[Mirror, KubeClient]] = []

    async def make(**settings: Any) -> Mirror:
        server = ApiServer(**settings)
        await server.start()
        configuration = Configuration()
        configuration.host = server.url
        kube = KubeClient(ApiClient(configuration))
        sink = Names()
        reflector = Reflector("things", kube, sink, path=PATH, query={"labelSelector": "x"})
        mirror = Mirror(server, sink, reflector, asyncio.create_task(reflector.run()))
        made.append((mirror, kube))
        return mirror

    yield make
    for one, kube in made:
        one.task.cancel()
        with suppress(asyncio.CancelledError):
            await one.task
        await kube.close()
        await one.server.stop()


async def until(fact: Callable[[], object]) -> None:
    async with asyncio.timeout(300):
        while not fact():  # noqa: ASYNC110  the fact is inside another server
            await asyncio.sleep(0.01)


async def test_a_list_in_pages_and_then_the_changes(mirror: Callable[..., Any]) -> None:
    one = await mirror(
        things=[thing("a", 1), thing("b", 2), thing("c", 3)],
        watches=[
            [
                event("ADDED", thing("d", 11)),
                event("MODIFIED", thing("d", 12)),
                event("DELETED", thing("a", 13)),
                "hang",
            ]
        ],
    )
    await until(lambda: one.sink.names == {"b", "c", "d"})
    assert one.reflector.is_synced
    assert [query.get("continue") for query in one.server.lists] == [None, "2"]
    assert all(query["labelSelector"] == "x" for query in one.server.asked)
    assert one.server.watched_from == ["10"]


BREAKS: dict[str, list[str] | int] = {
    "the server ends the watch": [],
    "the connection is reset": ["reset"],
    "the last line is cut": ['{"type": "ADD'],
    "a proxy answers 502": 502,
    "the server asks for patience": 429,
    "an error comes inside the watch": [
        json.dumps({"type": "ERROR", "object": {"code": 500, "message": "etcd"}}) + "\n"
    ],
}


@pytest.mark.parametrize("how", BREAKS.values(), ids=BREAKS)
async def test_a_watch_resumes_where_it_broke(
    mirror: Callable[..., Any], how: list[str] | int
) -> None:
    bookmark = event("BOOKMARK", {"metadata": {"resourceVersion": "20"}})
    one = await mirror(
        things=[thing("a", 1)],
        watches=[
            [event("ADDED", thing("b", 11)), bookmark],
            how,
            [event("ADDED", thing("c", 21)), "hang"],
        ],
    )
    await until(lambda: one.sink.names == {"a", "b", "c"})
    assert one.server.watched_from == ["10", "20", "20"]
    assert len(one.server.lists) == 1


@pytest.mark.parametrize(
    "gone",
    [
        410,
        [json.dumps({"type": "ERROR", "object": {"code": 410, "message": "too old"}}) + "\n"],
    ],
    ids=["as status", "as event"],
)
async def test_a_watch_that_is_too_old_lists_again(
    mirror: Callable[..., Any], gone: list[str] | int
) -> None:
    one = await mirror(
        things=[thing("a", 1), thing("b", 2)], later=[thing("b", 2)], watches=[[], gone]
    )
    await until(lambda: one.server.watched_from[-1:] == ["30"])
    assert one.sink.names == {"b"}
    assert one.server.watched_from == ["10", "10", "30"]


async def test_what_is_known_stays_while_the_server_is_away(mirror: Callable[..., Any]) -> None:
    one = await mirror(things=[thing("a", 1)], watches=[[], *[503] * 5, ["hang"]])
    await until(lambda: len(one.server.watched_from) >= 7)
    assert one.sink.names == {"a"}
    assert one.reflector.is_synced
    await until(lambda: one.reflector.last_error is None)
    assert not one.task.done()


async def test_a_server_that_is_gone_and_comes_back_is_followed_again(
    mirror: Callable[..., Any],
) -> None:
    one = await mirror(things=[thing("a", 1)])
    await until(lambda: one.server.watched_from)
    await one.server.stop()
    await until(lambda: one.reflector.last_error)
    assert one.sink.names == {"a"}
    one.server.watches = [[event("ADDED", thing("b", 11)), "hang"]]
    await one.server.start()
    await until(lambda: one.sink.names == {"a", "b"})
    assert len(one.server.lists) == 1


async def test_not_synced_before_the_first_list_and_the_reason_is_known(
    mirror: Callable[..., Any],
) -> None:
    one = await mirror(list_status=403)
    await until(lambda: one.reflector.last_error)
    assert not one.reflector.is_synced
    assert one.reflector.last_error == "403: not now"
    assert one.reflector.contact_age_s() is None
    one.server.list_status = 200
    await until(lambda: one.reflector.is_synced)
    assert one.reflector.contact_age_s() is not None


async def test_calls_report_the_servers_words(mirror: Callable[..., Any]) -> None:
    one = await mirror(list_status=409)
    configuration = Configuration()
    configuration.host = one.server.url
    async with KubeClient(ApiClient(configuration)) as kube:
        with pytest.raises(KubeError, match="409: not now"):
            await kube.call("POST", PATH, {"a": 1})
