"""`mizzen gateway` as a process: it starts, says why it cannot, and ends when told to."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from aiohttp import ClientSession

LOCAL = ("--host", "127.0.0.1", "--auth", "off", "--upstream", "m=http://127.0.0.1:1")
Start = Callable[..., asyncio.Future[asyncio.subprocess.Process]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    started: list[asyncio.subprocess.Process] = []

    async def run(*arguments: str) -> asyncio.subprocess.Process:
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("MIZZEN", "KUBE"))}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mizzen.cli", "gateway", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={**outside, "HOME": "/nonexistent"},
        )
        started.append(process)
        return process

    yield run  # type: ignore[misc]
    for process in started:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _port_of(process: asyncio.subprocess.Process) -> int:
    assert process.stderr is not None
    async for line in process.stderr:
        if found := re.search(rb"listens on \S+:(\d+)", line):
            return int(found[1])
    raise AssertionError("it ended without listening")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_serves_until_told_to_stop(start: Start, number: signal.Signals) -> None:
    process = await start(*LOCAL, "--port", "0", "--metrics-port", "0", "--lame-duck-s", "0")
    port = await _port_of(process)
    async with ClientSession() as client, client.get(f"http://127.0.0.1:{port}/v1/models") as got:
        assert [entry["id"] for entry in (await got.json())["data"]] == ["m"]
    process.send_signal(number)
    assert await process.wait() == 0


async def test_a_second_signal_ends_the_wait(start: Start) -> None:
    process = await start(*LOCAL, "--port", "0", "--metrics-port", "0", "--lame-duck-s", "3600")
    await _port_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    async for line in process.stderr:
        if b"shutting down" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0


async def test_a_port_that_is_taken_is_named(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = await start(*LOCAL, "--port", port, "--metrics-port", "0")
        _, said = await process.communicate()
    assert process.returncode == 42
    assert port in said.decode()
    assert "Traceback" not in said.decode()


async def test_without_a_cluster_it_says_how_to_do_without(start: Start) -> None:
    process = await start("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0")
    _, said = await process.communicate()
    assert process.returncode == 42
    assert "No access to a cluster" in said.decode()
    assert "--upstream NAME=" in said.decode()
    assert "Traceback" not in said.decode()


@pytest.fixture
def few_open_files() -> Iterator[int]:
    """Start with a shell's usual limit; the value is the hard one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[0]), before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_ten_thousand_idle_connections_keep_nobody_from_an_answer(
    start: Start, few_open_files: int
) -> None:
    idle, hard = 10_000, few_open_files
    if hard < idle + 500:
        pytest.skip(f"this system lets a process open {hard} files, fewer than the test's clients")
    timeouts = ("--header-timeout-s", "600", "--idle-timeout-s", "600")
    process = await start(*LOCAL, "--port", "0", "--metrics-port", "0", *timeouts)
    port = await _port_of(process)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as connections:
        for _ in range(idle):
            connections.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        async with (
            ClientSession() as client,
            client.get(f"http://127.0.0.1:{port}/v1/models") as answer,
        ):
            assert answer.status == 200
        assert process.returncode is None
