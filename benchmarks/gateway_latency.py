"""What the gateway adds to a stream, beside nginx and other routers, before one dummy backend.

    python -m benchmarks.gateway_latency [--peer litellm=http://127.0.0.1:4000 ...]

The backend answers every request with a stream of 16 events, 2 ms apart. The gateway runs as it
does in a pod: keys on, affinity, limits. nginx is Debian's with one worker: the floor. Printed for
prompts of 200 bytes and of 100 KB: the time to the first event added to the direct way (one request
at a time, in turns with it), and requests per second of one core: requests over the processor
seconds the proxy used while 16 clients asked. Processor time, unlike waiting time, hardly depends
on what else the machine does.

--peer NAME=URL measures a router that you have started before the backend (--backend-port); its
processor time is read with --peer-pid NAME=PID (its children count).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from mizzen.runtime.gateway.keys import hash_key, make_key

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


async def added_latency(targets: list[Target], prompt_bytes: int, count: int) -> dict[str, object]:
    """Ask in turns, one request at a time; return p50 and p99 in ms, added to the direct way."""
    seen: dict[str, list[float]] = {target.name: [] for target in targets}
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


def free_port() -> int:
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(port: int) -> None:
    """Return when somebody listens."""
    for _ in range(1200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    sys.exit(f"nobody listens on port {port}")


@contextmanager
def running(command: list[str], port: int) -> Iterator[int]:
    """Run a server until the block ends; the value is its pid."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def find_nginx(cache: Path) -> Path | None:
    """Return the installed nginx, else Debian's, unpacked into a cache; None without either."""
    if (installed := shutil.which("nginx")) is not None:
        return Path(installed)
    unpacked = cache / "usr/sbin/nginx"
    if not unpacked.exists() and shutil.which("apt-get"):
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", "nginx"], cwd=cache, check=False)
        for package in cache.glob("nginx_*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(cache)], check=True)
    return unpacked if unpacked.exists() else None


def nginx_config(folder: Path, port: int, backend_port: int) -> Path:
    """Write a configuration of one worker that streams."""
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log /dev/null;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log off; client_max_body_size 16m; client_body_buffer_size 1m;\n"
        + "".join(
            f"{kind}_temp_path {folder};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        + f"upstream backend {{ server 127.0.0.1:{backend_port}; keepalive 64; }}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://backend;\n"
        'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; } } }\n'
    )
    return path


def start_targets(stack: ExitStack, args: argparse.Namespace) -> list[Target]:
    """Start the backend, nginx and the gateway."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    backend_port = args.backend_port or free_port()
    backend = [sys.executable, "-m", "benchmarks.gateway_latency", "--serve", str(backend_port)]
    stack.enter_context(running(backend, backend_port))
    targets = [Target("direct", backend_port)]
    if (nginx := find_nginx(args.cache)) is not None:
        port = free_port()
        config = nginx_config(folder, port, backend_port)
        command = [str(nginx), "-p", str(folder), "-c", str(config)]
        targets.append(Target("nginx", port, pid=stack.enter_context(running(command, port))))
    key, port = make_key(), free_port()
    (folder / "keys").write_text(f"bench {hash_key(key)} requests-per-minute=100000000\n")
    command = [
        *(sys.executable, "-m", "mizzen.cli", "gateway", "--host", "127.0.0.1"),
        *("--port", str(port), "--metrics-port", str(free_port())),
        *("--upstream", f"dummy=http://127.0.0.1:{backend_port}"),
        *("--keys-file", str(folder / "keys"), "--lame-duck-s", "0", "--log-level", "warning"),
    ]
    pid = stack.enter_context(running(command, port))
    targets.append(Target("mizzen", port, key=key, pid=pid))
    pids = dict(entry.split("=") for entry in args.peer_pid)
    for entry in args.peer:
        name, _, url = entry.partition("=")
        peer_pid = int(pids[name]) if name in pids else None
        port = int(url.rsplit(":", 1)[1])
        # Some listen only once they have seen their backend well.
        wait_for(port)
        targets.append(Target(name, port, key="sk-bench", pid=peer_pid))
    return targets


async def measure(targets: list[Target], args: argparse.Namespace) -> None:
    """Print one line for each size of prompt."""
    for label, prompt_bytes in _PROMPTS.items():
        added = await added_latency(targets, prompt_bytes, args.requests)
        rates = {
            target.name: round(await per_core(target, prompt_bytes, args.requests))
            for target in targets
            if target.pid is not None
        }
        print(json.dumps({"prompt": label, "added": added, "requests_per_s_per_core": rates}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--peer", action="append", default=[], help="NAME=URL of another router")
    parser.add_argument("--peer-pid", action="append", default=[], help="NAME=PID of it")
    parser.add_argument("--backend-port", type=int, default=0, help="for peers started before")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/mizzen/nginx")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        asyncio.run(_serve_backend(args.serve))
        return
    with ExitStack() as stack:
        asyncio.run(measure(start_targets(stack, args), args))


if __name__ == "__main__":
    main()
