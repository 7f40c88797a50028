"""The operator's client against our real runtime server, played engine behind it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mizzen.operator.runtimes import AdapterRefusedError, HttpRuntimes, LoadedAdapter
from mizzen.runtime.train.digest import digest_of, hash_files
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.runtime_server import Running, running_server

HERE = "127.0.0.1"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret\n")
    return path


def client(running: Running, token_file: Path) -> HttpRuntimes:
    ports = running.server.ports
    return HttpRuntimes(token_file, http_port=ports.http, admin_port=ports.admin)


async def test_an_adapter_is_loaded_listed_and_unloaded(token_file: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "support"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    digest = f"sha256:{digest_of(hash_files(adapter))}"
    settings = {"admin_token_file": token_file, "adapter_root": [tmp_path]}
    async with running_server(FakeEngine(), **settings) as running:
        runtimes = client(running, token_file)
        assert await runtimes.adapters(HERE) == ()
        assert await runtimes.load_adapter(HERE, "support", path=str(adapter), digest=digest)
        assert await runtimes.adapters(HERE) == (LoadedAdapter("support", digest),)
        assert await runtimes.unload_adapter(HERE, "support")
        assert await runtimes.unload_adapter(HERE, "support"), "gone already is as good"
        assert await runtimes.adapters(HERE) == ()
        await runtimes.close()


async def test_a_refused_adapter_comes_with_the_runtimes_reason(
    token_file: Path, tmp_path: Path
) -> None:
    async with running_server(FakeEngine(), admin_token_file=token_file) as running:
        runtimes = client(running, token_file)
        with pytest.raises(AdapterRefusedError, match="are loaded only from below"):
            await runtimes.load_adapter(HERE, "support", path=str(tmp_path), digest=None)
        await runtimes.close()


async def test_a_drain_refuses_new_requests_and_counts_those_left(token_file: Path) -> None:
    engine = FakeEngine(stall_after=1)
    async with running_server(engine, admin_token_file=token_file) as running:
        runtimes = client(running, token_file)
        body = {"model": "tiny", "prompt": "a", "max_tokens": 5, "stream": True}
        async with running.http.stream("POST", "/v1/completions", json=body) as answer:
            await answer.aiter_raw().__anext__()
            assert await runtimes.drain(HERE) == 1
            assert await runtimes.drain(HERE) == 1, "asking again is no other drain"
            assert not running.service.is_ready()
            engine.release.set()
        for _ in range(500):
            if await runtimes.drain(HERE) == 0:
                break
            await asyncio.sleep(0.01)
        assert await runtimes.drain(HERE) == 0
        await runtimes.close()


async def test_a_probe_prompt_is_continued_or_there_is_no_answer(token_file: Path) -> None:
    async with running_server(FakeEngine(), admin_token_file=token_file) as running:
        runtimes = client(running, token_file)
        said = await runtimes.complete(HERE, "tiny", "Once upon", max_tokens=3)
        assert said
        assert await runtimes.complete(HERE, "another", "Once upon", max_tokens=3) is None
        await runtimes.close()
    runtimes = HttpRuntimes(token_file, http_port=1, admin_port=1)
    assert await runtimes.complete(HERE, "tiny", "Once upon", max_tokens=3) is None
    await runtimes.close()


async def test_a_wrong_token_or_no_runtime_is_no_answer_rather_than_an_error(
    token_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_text("wrong")
    async with running_server(FakeEngine(), admin_token_file=token_file) as running:
        runtimes = client(running, other)
        assert await runtimes.adapters(HERE) is None
        assert await runtimes.drain(HERE) is None
        assert not await runtimes.load_adapter(HERE, "a", path="/mnt/pvc/a", digest=None)
        await runtimes.close()
    runtimes = HttpRuntimes(token_file, http_port=1, admin_port=1)
    assert await runtimes.drain(HERE) is None
    assert not await runtimes.load_adapter(HERE, "a", path="/mnt/pvc/a", digest=None)
    await runtimes.close()
