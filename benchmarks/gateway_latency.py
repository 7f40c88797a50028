"""What the gateway adds to a stream, beside nginx and other routers, before one dummy backend.

    python -m benchmarks.gateway_latency [--requests 1000] [--peers nginx litellm vllm-router]

The backend answers every request with a stream of 16 events, 2 ms apart. The gateway runs as it
does in a pod: keys on, affinity, limits. The others are started by the script: nginx (Debian's, one
worker) as the floor, litellm's proxy (one worker, a key) and vllm-router from PyPI, each in an
environment of its own that is made at the first run. Printed for prompts of 200 bytes and of 100
KB: the time to the first event added to the direct way (one request at a time, in turns with it),
and requests per second of one core: requests over the processor seconds the proxy used while 16
clients asked. Processor time, unlike waiting time, hardly depends on what else the machine does.
`ratios` are the figures to reach: Mizzen's requests per core over litellm's (5 or more), its p99
over vllm-router's (2 or less).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.gateway_routers import ROUTERS, Place
from hack.ports import free_port

_EVENTS = 16
_GAP_S = 0.002
_PROMPTS = {"short": 200, "100KB": 100_000}
_PATH = "/v1/chat/completions"
_CHUNK = {
    "created": 0,
    "model": "dummy",
    "choices": [{"index": 0, "delta": {"content": " token"}, "finish_reason": None}],
}
_EVENT = (
    f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', **_CHUNK})}\n\n".encode()
)
Added = dict[str, dict[str, float]]
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Backend(asyncio.Protocol):
    """As little of an HTTP server as the measurement needs."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET "):  # a router that looks whether its backend is well
            self.received = b""
            self._write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            return
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            whole = body.endswith(b"0\r\n\r\n")
        else:
            length = lower.partition(b"content-length:")[2].split(b"\r\n")[0]
            whole = len(body) >= int(length or 0)
        if whole:
            self.received = b""
            self._write(_HEAD + _chunk(_EVENT))
            self._go_on(1)

    def _go_on(self, sent: int) -> None:
        asyncio.get_running_loop().call_later(_GAP_S, self._next, sent)

    def _next(self, sent: int) -> None:
        if sent < _EVENTS:
            self._write(_chunk(_EVENT))
            self._go_on(sent + 1)
        else:
            self._write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        if isinstance(self.transport, asyncio.WriteTransport):
            self.transport.write(data)


async def _serve_backend(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", port)
    await server.serve_forever()


@dataclass(frozen=True, slots=True)
class Target:
    """One way to the backend."""

    name: str
    port: int
    key: str = ""
    pid: int | None = None

    def request(self, prompt_bytes: int) -> bytes:
        """Return a whole HTTP request."""
        messages = [{"role": "user", "content": "x" * prompt_bytes}]
        body = json.dumps({"model": "dummy", "stream": True, "messages": messages}).encode()
        head = (
            f"POST {_PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self.key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def cpu_s(self) -> float:
        """Return the processor seconds used so far, children included."""
        if self.pid is None:
            return 0.0
        parent = psutil.Process(self.pid)
        every = [parent, *parent.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in every)


async def ask(target: Target, request: bytes, count: int) -> list[float]:
    """Ask so many times over one connection; return the seconds to each first event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    took = []
    for _ in range(count):
        started = time.perf_counter()
        writer.write(request)
        await reader.readuntil(b"data: ")
        took.append(time.perf_counter() - started)
        await reader.readuntil(b"[DONE]")
        await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    return took


async def added_latency(targets: list[Target], prompt_bytes: int, count: int) -> Added:
    """Ask in turns, one request at a time; return p50 and p99 in ms, added to the direct way."""
    seen: dict[str, list[float]] = {target.name: [] for target in targets}
    for target in targets:  # a first request pays for connections and caches
        await ask(target, target.request(prompt_bytes), 3)
    for _ in range(count // 10):
        for target in targets:
            seen[target.name] += await ask(target, target.request(prompt_bytes), 10)
    direct = seen["direct"]
    return {
        name: {
            "p50_added_ms": round((statistics.median(took) - statistics.median(direct)) * 1e3, 2),
            "p99_added_ms": round((_p99(took) - _p99(direct)) * 1e3, 2),
        }
        for name, took in seen.items()
        if name != "direct"
    }


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


async def per_core(target: Target, prompt_bytes: int, count: int) -> float:
    """Return requests per processor second with 16 clients at once."""
    request = target.request(prompt_bytes)
    await ask(target, request, 20)
    before = target.cpu_s()
    await asyncio.gather(*(ask(target, request, count // 16) for _ in range(16)))
    return (count // 16) * 16 / (target.cpu_s() - before)


# The processes.


def wait_for(port: int) -> None:
    """Return when somebody listens."""
    for _ in range(1200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    sys.exit(f"nobody listens on port {port}")


@contextmanager
def running(
    command: Sequence[str], port: int, environment: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Run a server until the block ends; the value is its pid."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | (environment or {}),
    )
    try:
        wait_for(port)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def start_targets(stack: ExitStack, peers: Sequence[str], cache: Path) -> list[Target]:
    """Start the backend, the gateway and the routers beside it."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    backend_port = free_port()
    backend = [sys.executable, "-m", "benchmarks.gateway_latency", "--serve", str(backend_port)]
    stack.enter_context(running(backend, backend_port))
    targets = [Target("direct", backend_port)]
    for name in ("mizzen", *peers):
        router = ROUTERS[name](Place(folder, free_port(), backend_port, cache))
        if router is None:
            print(f"without {name}: it cannot be had here", file=sys.stderr)
            continue
        print(f"starting {name}", file=sys.stderr)
        pid = stack.enter_context(running(router.command, router.port, router.environment))
        targets.append(Target(name, router.port, key=router.key, pid=pid))
    return targets


def ratios(added: Added, rates: Mapping[str, int]) -> dict[str, float | None]:
    """Return the two figures to reach, as far as the peers are there."""
    p99 = {name: figures["p99_added_ms"] for name, figures in added.items()}
    router_ms, litellm = p99.get("vllm-router"), rates.get("litellm")
    return {
        "per_core_over_litellm": round(rates["mizzen"] / litellm, 2) if litellm else None,
        # What the other one adds may be nothing at all where the machine is not quiet.
        "p99_over_vllm_router": (
            round(p99["mizzen"] / router_ms, 2) if router_ms and router_ms > 0 else None
        ),
    }


async def measure(targets: list[Target], args: argparse.Namespace) -> None:
    """Print one line for each size of prompt."""
    for label, prompt_bytes in _PROMPTS.items():
        added = await added_latency(targets, prompt_bytes, args.requests)
        rates = {
            target.name: round(await per_core(target, prompt_bytes, args.requests))
            for target in targets
            if target.pid is not None
        }
        row = {"prompt": label, "added": added, "requests_per_s_per_core": rates}
        print(json.dumps({**row, "ratios": ratios(added, rates)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    others = [name for name in ROUTERS if name != "mizzen"]
    parser.add_argument("--peers", nargs="*", choices=others, default=others)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/mizzen/nginx")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        asyncio.run(_serve_backend(args.serve))
        return
    with ExitStack() as stack:
        asyncio.run(measure(start_targets(stack, args.peers, args.cache), args))


if __name__ == "__main__":
    main()
