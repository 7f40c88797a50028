"""`mizzen serve hf://...`: the ports answer while the files come, and the model is served after."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hack.ports import free_port
from hack.tiny_model import write_tiny_model
from mizzen.operator.runtimes import HttpRuntimes
from mizzen.runtime.config import ServeConfig
from mizzen.runtime.engine.spawn import EngineProcess
from mizzen.runtime.server.main import serve
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.hub_server import HubServer, running_hub
from tests.fixtures.runtime_server import running_server

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub() as server:
        model = write_tiny_model(tmp_path / "tiny")
        server.add("org/tiny", {path.name: path.read_bytes() for path in model.iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


async def test_the_admin_port_tells_how_far_the_files_have_come(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.hold = threading.Event()
    given: list[ServeConfig] = []

    async def start(config: ServeConfig, _: Any) -> FakeEngine:
        given.append(config)
        return FakeEngine()

    token = tmp_path / "token"
    token.write_text("secret")
    settings = {"model": "hf://org/tiny", "cache_dir": tmp_path / "cache"}
    async with running_server(start, wait=False, admin_token_file=token, **settings) as running:
        # Asked as the operator asks.
        runtimes = HttpRuntimes(token, admin_port=running.server.ports.admin)

        async def loading() -> dict[str, Any]:
            return await runtimes.loading("127.0.0.1") or {}

        while not (seen := await loading()).get("bytes", 0) > 0:  # noqa: ASYNC110 - as a poll does
            await asyncio.sleep(0.01)
        assert seen["stage"] == "Downloading"
        assert seen["bytes"] < seen["totalBytes"]
        assert (await running.admin.get("/loading")).status_code == 401
        assert (await running.admin.get("/readyz")).status_code == 503
        hub.hold.set()
        await running.server.started.wait()
        assert await loading() == {}
        assert running.service.served_name == "tiny"
        await runtimes.close()
    (config,) = given
    assert (config.model_path / "config.json").exists()
    assert config.model_path.is_relative_to(tmp_path / "cache")


async def test_a_model_named_by_its_address_is_served_from_the_command_line(
    hub: HubServer, tmp_path: Path
) -> None:
    ports = {name: free_port() for name in ("port", "grpc-port", "admin-port")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mizzen.cli", "serve", "hf://org/tiny", "--host=127.0.0.1"),
        *(f"--{name}={port}" for name, port in ports.items()),
        *("--device=cpu", "--kv-cache-gib=0.02", f"--cache-dir={tmp_path / 'cache'}"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports['port']}") as client:
            while not await is_ready(client):
                assert process.returncode is None
                await asyncio.sleep(0.2)
            answer = await client.post("/v1/chat/completions", json=CHAT, timeout=60)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] > 0
    finally:
        process.kill()
        await process.wait()


async def is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/v2/health/ready")).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("source", "statuses", "code", "reason"),
    [
        ("hf://org/none", [], 42, "SourceNotFound"),
        ("hf://org/tiny", [401], 42, "SourceForbidden"),
        ("hf://org/tiny", [500] * 20, 1, "SourceUnreachable"),
    ],
    ids=["a mistake in the address", "a token that is wanted", "a hub that is away"],
)
def test_the_last_words_name_the_cause_and_the_exit_code_whether_to_try_again(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    statuses: list[int],
    code: int,
    reason: str,
) -> None:
    words = tmp_path / "last-words"
    monkeypatch.setenv("MIZZEN_TERMINATION_LOG", str(words))
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.refuse["revision/main"] = statuses
    ended = serve(
        ServeConfig(
            model=source, cache_dir=tmp_path / "cache", host="127.0.0.1",
            port=0, grpc_port=0, admin_port=0,
        ),
        EngineProcess(),
    )  # fmt: skip
    assert ended == code
    assert json.loads(words.read_text())["reason"] == reason
