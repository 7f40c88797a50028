"""What a client gets from the gateway before any replica is asked: keys, bodies, names, health."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientSession, web

from mizzen.runtime.gateway.app import build_app
from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.directory import Endpoint, ServedModel
from mizzen.runtime.gateway.keys import hash_key, make_key, parse_hash
from mizzen.runtime.gateway.reflector import Reflector
from mizzen.runtime.gateway.server import Gateway

CHAT = "/v1/chat/completions"
KEY = make_key()


class Front:
    """A gateway with a key, an echoing replica and a raw client."""

    def __init__(self, gateway: Gateway, client: ClientSession) -> None:
        self.gateway = gateway
        self.client = client
        self.headers: dict[str, str] = {"Authorization": f"Bearer {KEY}"}
        self.seen: list[web.BaseRequest] = []

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.gateway.port}{path}"
        async with self.client.get(url, headers={**self.headers, **headers}) as answer:
            return answer.status, await answer.json()

    async def post(self, data: bytes | AsyncIterator[bytes], path: str = CHAT) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.gateway.port}{path}"
        async with self.client.post(url, data=data, headers=self.headers) as answer:
            return answer.status, await answer.json()

    async def raw(self, head: bytes, *, then: bytes = b"") -> bytes:
        """Send exactly these bytes and return the first line and headers of the answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.gateway.port)
        writer.write(head + then)
        answer = await reader.readuntil(b"\r\n\r\n")
        answer += await reader.read(4096)
        writer.close()
        return answer


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    config = GatewayConfig(
        host="127.0.0.1",
        port=0,
        metrics_port=0,
        auth="off",
        upstream=["local=http://127.0.0.1:1"],
        lame_duck_s=0,
        max_body_mib=1,
        body_timeout_s=0.5,
    )
    gateway = Gateway(config)
    gateway.config.auth = "on"
    await gateway.start()
    hashed = parse_hash(hash_key(KEY))
    assert hashed is not None
    gateway.keyring.replace("test", {"me": hashed})
    async with ClientSession() as client:
        house = Front(gateway, client)

        async def echo(request: web.BaseRequest) -> web.Response:
            house.seen.append(request)
            return web.json_response({"got": json.loads(await request.read())})

        runner = web.ServerRunner(web.Server(echo))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        gateway.directory.replace_models(
            [ServedModel("team", "tiny", "tiny", 1700000000, ("support",))], namespace=None
        )
        gateway.directory.put_slice(
            ("team", "s"),
            deployment=("team", "tiny"),
            endpoints=(Endpoint(f"http://127.0.0.1:{runner.addresses[0][1]}"),),
        )
        yield house
        await runner.cleanup()
    await gateway.close()


# Keys.


@pytest.mark.parametrize(
    ("header", "says"),
    {
        "no header": ("", "Send an API key"),
        "another scheme": ("Basic abc", "Send an API key"),
        "an empty key": ("Bearer ", "Send an API key"),
        "a wrong key": ("Bearer mz-wrong", "The API key is not valid."),
    }.values(),
    ids=["no header", "another scheme", "an empty key", "a wrong key"],
)
async def test_nobody_gets_in_without_a_key(front: Front, header: str, says: str) -> None:
    front.headers = {"Authorization": header} if header else {}
    status, document = await front.post(b'{"model": "tiny"}')
    assert status == 401
    assert says in document["error"]["message"]
    assert document["error"]["code"] == "invalid_api_key"
    assert not front.seen


async def test_every_route_there_is_asks_for_a_key(front: Front) -> None:
    front.headers = {}
    app = build_app(front.gateway._parts(front.gateway._intake(front.client)))
    paths = {route.resource.canonical for route in app.router.routes() if route.resource}
    assert {
        CHAT,
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/files",
        "/v1/batches",
    } <= paths
    for path in [*paths, "/", "/nowhere", "/v1/../metrics", "/metrics", "/healthz"]:
        assert (await front.get(path.replace("{model}", "tiny")))[0] == 401
        assert (await front.post(b"{}", path))[0] == 401


async def test_without_any_key_the_error_says_how_to_make_one(front: Front) -> None:
    front.gateway.keyring.replace("test", {})
    status, document = await front.get("/v1/models")
    assert status == 401
    assert "mizzen keys create" in document["error"]["message"]


async def test_the_gateways_key_never_reaches_a_replica(front: Front) -> None:
    assert (await front.post(b'{"model": "tiny"}'))[0] == 200
    assert "Authorization" not in front.seen[0].headers


# Bodies.

BAD_BODIES = {
    "nothing": (b"", "The request has no body"),
    "no JSON": (b'{"model": "tiny",\n "messages" 1}', "Expecting ':' delimiter at line 2"),
    "not UTF-8": (b'{"model": "\xff"}', "not valid UTF-8 at byte 11"),
    "a list": (b"[1]", "The request body is a list; send a JSON object."),
    "a string": (b'"x"', "The request body is a string"),
    "no model": (b"{}", "The field 'model' is missing"),
    "a model of null": (b'{"model": null}', "The field 'model' is missing"),
    "a model of number": (b'{"model": 7}', "The field 'model' is a number"),
    "an empty model": (b'{"model": ""}', "The field 'model' is an empty string"),
    "nested a million deep": (b"[" * 1_000_000, "cannot be read as JSON (RecursionError)"),
    "a number of a million digits": (b"9" * 1_000_000, "cannot be read as JSON (ValueError)"),
}


@pytest.mark.parametrize(("body", "says"), BAD_BODIES.values(), ids=BAD_BODIES)
async def test_a_bad_body_is_named(front: Front, body: bytes, says: str) -> None:
    status, document = await front.post(body)
    assert (status, document["error"]["type"]) == (400, "invalid_request_error")
    assert says in document["error"]["message"]
    assert not front.seen


async def test_a_body_of_50_mb_is_refused_without_waiting_for_it(front: Front) -> None:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {50 * 2**20}\r\n\r\n"
    )
    # Only the first kilobyte is ever sent: an answer means that the rest was not waited for.
    answer = await front.raw(head.encode(), then=b" " * 1024)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"larger than 1 MiB" in answer


async def test_a_body_of_50_mb_sent_anyway_gets_the_same_answer(front: Front) -> None:
    status, document = await front.post(b"x" * (50 * 2**20))
    assert (status, document["error"]["code"]) == (413, "request_too_large")


async def test_a_body_without_a_length_is_cut_off_at_the_limit(front: Front) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    status, document = await front.post(pieces())
    assert (status, document["error"]["code"]) == (413, "request_too_large")


async def test_a_client_that_asks_first_need_not_send_a_large_body(front: Front) -> None:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {50 * 2**20}\r\nExpect: 100-continue\r\n\r\n"
    )
    assert (await front.raw(head.encode())).startswith(b"HTTP/1.1 413 ")


async def test_a_client_that_asks_first_may_send_a_small_body(front: Front) -> None:
    body = b'{"model": "tiny"}'
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    )
    answer = await front.raw(head.encode(), then=body)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


async def test_a_body_that_dribbles_in_is_given_up(front: Front) -> None:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Length: 100\r\n\r\n{"
    )
    assert (await front.raw(head.encode())).startswith(b"HTTP/1.1 408 ")


# Names.


async def test_an_unknown_model_is_404_and_the_known_ones_are_listed(front: Front) -> None:
    status, document = await front.post(b'{"model": "gpt-5"}')
    assert (status, document["error"]["code"]) == (404, "model_not_found")
    assert document["error"]["message"] == (
        "The model 'gpt-5' does not exist. Models served here: tiny, tiny:support."
    )


async def test_models_and_their_adapters_are_listed(front: Front) -> None:
    status, document = await front.get("/v1/models")
    assert status == 200
    base = {"object": "model", "created": 1700000000, "owned_by": "team"}
    assert document == {
        "object": "list",
        "data": [{"id": "tiny", **base}, {"id": "tiny:support", "parent": "tiny", **base}],
    }


@pytest.mark.parametrize("name", ["tiny", "tiny:support", "team/tiny", "team/tiny:support"])
async def test_one_model_can_be_asked_for(front: Front, name: str) -> None:
    status, document = await front.get(f"/v1/models/{name}")
    assert (status, document["id"]) == (200, name)


@pytest.mark.parametrize("name", ["other", "tiny:other", "tiny:", "other/tiny"])
async def test_asking_for_a_model_that_is_not_there_is_404(front: Front, name: str) -> None:
    assert (await front.get(f"/v1/models/{name}"))[0] == 404


async def test_before_the_first_list_an_unknown_model_may_still_come(front: Front) -> None:
    class Nowhere:
        pass

    front.gateway.lifecycle.reflectors.append(
        Reflector("late", Nowhere(), Nowhere(), path="/")  # type: ignore[arg-type]
    )
    status, document = await front.post(b'{"model": "later"}')
    assert (status, document["error"]["code"]) == (503, "model_not_ready")


async def test_other_paths_and_methods_are_refused_in_openais_shape(front: Front) -> None:
    status, document = await front.get("/v1/responses")
    assert status == 404
    assert "There is no /v1/responses here" in document["error"]["message"]
    status, document = await front.get(CHAT)
    assert status == 405
    assert "use POST" in document["error"]["message"]


# Health.


async def test_health_metrics_and_readiness_are_on_the_other_port(front: Front) -> None:
    await front.post(b'{"model": "tiny"}')
    await front.post(b'{"model": "made-up-by-a-client"}')
    port = front.gateway.metrics_port
    for path, says in {
        "/healthz": '"broken": null',
        "/readyz": '"ready": true',
        "/metrics": 'mizzen_gateway_requests_total{code="200",model="tiny",namespace="team"} 1.0',
    }.items():
        async with front.client.get(f"http://127.0.0.1:{port}{path}") as answer:
            assert answer.status == 200
            text = await answer.text()
            assert says in text
            assert "made-up" not in text


async def test_not_ready_while_shutting_down(front: Front) -> None:
    front.gateway.lifecycle.is_draining = True
    async with front.client.get(f"http://127.0.0.1:{front.gateway.metrics_port}/readyz") as answer:
        assert (answer.status, (await answer.json())["draining"]) == (503, True)
    url = f"http://127.0.0.1:{front.gateway.port}/v1/models"
    async with front.client.get(url, headers=front.headers) as models:
        assert models.headers["Connection"] == "close"


async def test_a_strange_request_id_is_replaced(front: Front) -> None:
    url = f"http://127.0.0.1:{front.gateway.port}/v1/models"
    for given, is_kept in (("abc-1.2_3", True), ("a b", False), ("x" * 200, False)):
        headers = {**front.headers, "X-Request-Id": given}
        async with front.client.get(url, headers=headers) as answer:
            assert (answer.headers["X-Request-Id"] == given) is is_kept
