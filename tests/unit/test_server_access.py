"""Who may call what: nothing is reachable without a class, and each class is enforced."""

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
import tritonclient.grpc.aio
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from mizzen.runtime.config import ServeConfig
from mizzen.runtime.server.access import Access, Gate, SecretFile, is_loopback
from mizzen.runtime.server.admin import admin_routes, build_admin_app
from mizzen.runtime.server.app import build_user_app, user_routes
from mizzen.runtime.server.drain import Drain
from mizzen.runtime.server.grpc_server import METHOD_ACCESS, _peer_address
from mizzen.runtime.server.metrics import Metrics
from mizzen.runtime.server.routes import GuardedRoute
from mizzen.runtime.server.service import Service
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.runtime_server import Running, running_server

LOAD = "/v2/repository/models/a/load"


def all_routes() -> list[GuardedRoute]:
    service = Service(ServeConfig(model="/models/tiny"), Metrics("tiny"))
    return [*user_routes(service), *admin_routes(service, Drain(service, lame_duck_s=0))]


def classes() -> dict[str, Access]:
    return {
        f"{method} {route.path}": route.access
        for route in all_routes()
        for method in route.methods - {"HEAD"}
    }


async def test_every_http_route_has_a_class_and_only_health_and_metrics_are_open() -> None:
    assert all(isinstance(route, GuardedRoute) for route in all_routes())
    opened = {name for name, access in classes().items() if access is Access.OPEN}
    assert opened == {
        "GET /health",
        "GET /healthz",
        "GET /readyz",
        "GET /metrics",
        "GET /v2/health/live",
        "GET /v2/health/ready",
    }


async def test_what_changes_the_server_is_for_admins() -> None:
    admin = {name for name, access in classes().items() if access is Access.ADMIN}
    assert admin == {
        "POST /v2/repository/models/{model:path}/load",
        "POST /v2/repository/models/{model:path}/unload",
        "POST /rollouts",
        "POST /rollouts/policy",
        "DELETE /rollouts/policy",
        "GET /drain",
        "POST /drain",
        "GET /adapters",
        "GET /loading",
        "GET /model",
        "POST /sleep",
        "POST /wake",
        "POST /weights",
        "GET /loan",
        "PUT /loan",
        "DELETE /loan",
    }


async def test_every_grpc_method_has_a_class() -> None:
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    methods = {f"/{service.full_name}/{method.name}" for method in service.methods}
    assert methods <= set(METHOD_ACCESS)
    opened = {name for name, access in METHOD_ACCESS.items() if access is Access.OPEN}
    assert {name.rpartition("/")[2] for name in opened} == {
        "Check",
        "Watch",
        "ServerLive",
        "ServerReady",
    }


async def test_the_apps_hold_no_route_beside_the_guarded_ones() -> None:
    service = Service(ServeConfig(model="/models/tiny"), Metrics("tiny"))
    users = build_user_app(service, Gate()).app
    admin = build_admin_app(service, Gate(), Drain(service, lame_duck_s=0))
    for app in (users, admin):
        assert app.routes
        assert all(type(route) is GuardedRoute for route in app.routes)


@pytest.fixture
def secrets(tmp_path: Path) -> tuple[Path, Path]:
    token, keys = tmp_path / "token", tmp_path / "keys"
    token.write_text("admin-token\n")
    keys.write_text("key-one\nkey-two\n")
    return token, keys


@pytest.fixture
async def guarded(secrets: tuple[Path, Path]) -> AsyncIterator[Running]:
    token, keys = secrets
    async with running_server(FakeEngine(), admin_token_file=token, api_key_file=keys) as running:
        yield running


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def _status(client: httpx.AsyncClient, name: str, headers: dict[str, str]) -> int:
    method, path = name.split()
    path = re.sub(r"{version}", "1", path)
    path = re.sub(r"{\w+:path}", "tiny", path)
    # A body that no call accepts, so that nothing is done where the caller is let in.
    answer = await client.request(method, path, content=b"{", headers=headers)
    return answer.status_code


async def test_each_route_lets_in_whom_its_class_says(guarded: Running) -> None:
    admin_paths = {route.path for route in admin_routes(guarded.service, guarded.server.drain)}
    for name, access in classes().items():
        client = guarded.admin if name.split()[1] in admin_paths else guarded.http
        statuses = {
            who: await _status(client, name, headers)
            for who, headers in {
                "nobody": {},
                "stranger": bearer("guess"),
                "basic": {"Authorization": "Basic a2V5LW9uZTo="},
                "user": bearer("key-two"),
                "admin": bearer("admin-token"),
            }.items()
        }
        let_in = {who for who, status in statuses.items() if status not in (401, 403)}
        expected = {
            Access.OPEN: {"nobody", "stranger", "basic", "user", "admin"},
            Access.USER: {"user", "admin"},
            Access.ADMIN: {"admin"},
        }[access]
        assert let_in == expected, (name, statuses)


async def test_a_refusal_says_how_to_be_let_in(guarded: Running) -> None:
    answer = await guarded.http.get("/v1/models")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "Authorization: Bearer" in answer.json()["error"]["message"]


async def test_grpc_checks_the_same_classes(guarded: Running) -> None:
    address = guarded.grpc_address
    async with tritonclient.grpc.aio.InferenceServerClient(address) as client:
        assert await client.is_server_ready()
        for headers in ({}, {"authorization": "Bearer guess"}):
            with pytest.raises(InferenceServerException) as caught:
                await client.get_server_metadata(headers=headers)
            assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
        await client.get_server_metadata(headers={"authorization": "Bearer key-one"})
        with pytest.raises(InferenceServerException) as caught:
            await client.unload_model("a", headers={"authorization": "Bearer key-one"})
        assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
        with pytest.raises(InferenceServerException) as caught:
            await client.unload_model("a", headers={"authorization": "Bearer admin-token"})
        assert caught.value.status() == "StatusCode.NOT_FOUND"

        async def one() -> AsyncIterator[dict[str, object]]:
            yield {"model_name": "tiny", "inputs": []}

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in client.stream_infer(one()):
                pass
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_rotated_token_counts_at_once(guarded: Running, secrets: tuple[Path, Path]) -> None:
    token, _ = secrets
    assert (await guarded.admin.get("/drain", headers=bearer("admin-token"))).status_code == 200
    # As kubelet does it: a new file takes the place of the old.
    fresh = token.with_name("fresh")
    fresh.write_text("other-token")
    os.replace(fresh, token)
    assert (await guarded.admin.get("/drain", headers=bearer("admin-token"))).status_code == 401
    assert (await guarded.admin.get("/drain", headers=bearer("other-token"))).status_code == 200


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe"])
def test_a_missing_empty_or_broken_secret_file_lets_nobody_in(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    gate = Gate(admin_token=SecretFile(path))
    for authorization in ("", "Bearer ", "Bearer", "Bearer x", "Bearer \xff"):
        refusal = gate.check(Access.ADMIN, authorization=authorization, peer="127.0.0.1")
        assert refusal is not None
        assert refusal.status == 401


def test_without_a_token_file_only_loopback_may_administer() -> None:
    gate = Gate()
    assert gate.check(Access.ADMIN, authorization="", peer="127.0.0.1") is None
    assert gate.check(Access.ADMIN, authorization="", peer="::1") is None
    refusal = gate.check(Access.ADMIN, authorization="", peer="10.0.0.7")
    assert refusal is not None
    assert refusal.status == 403
    assert "--admin-token-file" in refusal.message


async def test_a_page_in_a_browser_or_a_proxy_is_not_a_local_user() -> None:
    async with running_server(FakeEngine()) as running:
        assert (await running.admin.get("/drain")).status_code == 200
        for header in ("Origin", "Sec-Fetch-Site", "X-Forwarded-For", "Forwarded", "Via"):
            for client, path in ((running.admin, "/drain"), (running.http, LOAD)):
                answer = await client.post(path, headers={header: "127.0.0.1"})
                assert answer.status_code == 403
        assert not running.service.is_draining


def test_loopback_is_told_from_all_else() -> None:
    for peer in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(peer)
    for peer in ("", "10.0.0.1", "localhost", "::ffff:10.0.0.1", "0.0.0.0", "unix:"):
        assert not is_loopback(peer)


def test_a_grpc_peer_s_address_is_found_in_its_name() -> None:
    assert _peer_address("ipv4:127.0.0.1:4000") == "127.0.0.1"
    assert _peer_address("ipv6:%5B::1%5D:4000") == "::1"
    assert _peer_address("ipv6:[::1]:4000") == "::1"
    assert _peer_address("unix:/tmp/x") == ""
