"""`mizzen serve` as a process of its own, stopped as a kubelet stops it."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from hack.models import cache_dir
from hack.ports import free_port
from hack.tiny_model import write_tiny_model

CHAT = "/v1/chat/completions"


class Process:
    """A running `mizzen serve` and clients of its ports."""

    def __init__(self) -> None:
        self.ports = {name: free_port() for name in ("port", "grpc-port", "admin-port")}
        self.http, self.admin = (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.ports[name]}", timeout=300)
            for name in ("port", "admin-port")
        )
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, model: Path, *flags: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mizzen.cli", "serve", str(model), "--host=127.0.0.1"),
            *(f"--{name}={port}" for name, port in self.ports.items()),
            *("--device=cpu", "--dtype=float32", "--kv-cache-gib=0.1", *flags),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    async def is_ready(self) -> bool:
        try:
            return (await self.admin.get("/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    async def wait_until_ready(self) -> None:
        while not await self.is_ready():
            assert self.process.returncode is None
            await asyncio.sleep(0.2)


@asynccontextmanager
async def serving(model: Path, *flags: str) -> AsyncIterator[Process]:
    served = Process()
    await served.start(model, *flags)
    try:
        await served.wait_until_ready()
        yield served
    finally:
        if served.process.returncode is None:
            served.process.kill()
        await served.process.wait()
        await served.http.aclose()
        await served.admin.aclose()


async def watch_endpoint(served: Process, dropped: asyncio.Event) -> None:
    """Drop the endpoint half a second after its readiness fell, as endpoints propagate."""
    while await served.is_ready():  # noqa: ASYNC110 - as a kubelet probes
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    dropped.set()


async def send_until(
    dropped: asyncio.Event, served: Process, asked: dict[str, Any], answers: list[tuple[int, str]]
) -> None:
    """Send one request after the other and note how each ended."""
    while not dropped.is_set():
        answer = await served.http.post(CHAT, json=asked)
        answers.append((answer.status_code, answer.text[-14:]))


async def test_sigterm_under_load_fails_no_request(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "ignore_eos": True,
        "max_tokens": 60,
        "stream": True,
    }
    answers: list[tuple[int, str]] = []
    async with serving(model, "--lame-duck-seconds=15") as served:
        dropped = asyncio.Event()
        watch = asyncio.create_task(watch_endpoint(served, dropped))
        load = [asyncio.create_task(send_until(dropped, served, asked, answers)) for _ in range(4)]
        last = asyncio.create_task(served.http.post(CHAT, json=asked | {"max_tokens": 400}))
        while len(answers) <= 4:  # noqa: ASYNC110 - the senders count, they signal nothing
            await asyncio.sleep(0.01)
        served.process.send_signal(signal.SIGTERM)
        await asyncio.gather(watch, *load)
        assert set(answers) == {(200, "data: [DONE]\n\n")}
        assert (await last).text.endswith("data: [DONE]\n\n")
        assert await served.process.wait() == 0


async def test_sigterm_while_loading_ends_at_once_with_0(tmp_path: Path) -> None:
    served, model = Process(), write_tiny_model(tmp_path / "tiny")
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")  # weights that never come: it still loads when told
    await served.start(model)
    try:
        while True:
            try:
                answer = await served.admin.get("/readyz")
                break
            except httpx.TransportError:
                await asyncio.sleep(0.05)
        assert answer.status_code == 503
        assert answer.json()["phase"] in ("starting", "loading-model")
        served.process.send_signal(signal.SIGTERM)
        assert await served.process.wait() == 0
    finally:
        if served.process.returncode is None:
            served.process.kill()


async def test_a_killed_engine_ends_the_server_with_an_error(tmp_path: Path) -> None:
    async with serving(write_tiny_model(tmp_path / "tiny")) as served:
        (engine,) = psutil.Process(served.process.pid).children()
        engine.kill()
        assert await served.process.wait() == 1


@pytest.mark.model
async def test_the_real_small_model_answers_a_question() -> None:
    model = next(cache_dir().glob("*.gguf"))
    async with serving(model, "--served-model-name=smollm2", "--max-model-len=1024") as served:
        asked = {
            "model": "smollm2",
            "messages": [
                {
                    "role": "user",
                    "content": "What is the capital city of France? Answer in one sentence.",
                }
            ],
            "temperature": 0,
            "max_tokens": 20,
        }
        answer = (await served.http.post(CHAT, json=asked)).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert answer["choices"][0]["finish_reason"] == "stop"
