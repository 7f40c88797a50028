"""Hostile requests to every protocol of a running runtime and gateway; nothing may come of them.

    python -m benchmarks.fuzz_protocols --minutes 10 [--seed 1]

Starts a runtime with a random model of two layers and a gateway before it, on loopback. Beside each
other for the time given: schemathesis on the descriptions of both, wrong JSON, tensors, lengths and
encodings on both HTTP ports, broken HTTP on plain sockets, and broken messages on gRPC. At the end
a right request must be answered, no request may be left, and every block of the KV cache be free.

Prints a JSON summary; exits with 1 where something was found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from threading import Lock, Thread
from typing import Any
from urllib.parse import urlsplit

import httpx

from hack.fuzz.described import rounds
from hack.fuzz.send import GrpcSender, HttpSender, Sender, SocketSender
from hack.fuzz.tally import Tally
from hack.ports import free_ports
from hack.tiny_model import write_tiny_model

_START_S = 120.0
_SETTLE_S = 30.0
_EXAMPLES = 20


@contextmanager
def started(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "mizzen.cli", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"nothing answers at {url}")


class Run:
    """The time and the number of requests there are, shared by all threads."""

    def __init__(self, *, minutes: float, most: int) -> None:
        self._end_at = time.monotonic() + 60 * minutes
        self._left = most
        self._lock = Lock()

    def goes_on(self) -> bool:
        """Take one request from what is left."""
        with self._lock:
            self._left -= 1
            return self._left >= 0 and time.monotonic() < self._end_at

    def send_with(self, *senders: Sender) -> None:
        for sender in itertools.cycle(senders):
            if not self.goes_on():
                break
            sender.send()
        for sender in senders:
            sender.close()

    def describe_to(self, tally: Tally, seed: int, *ports: tuple[str, str]) -> None:
        # One thread for all: Hypothesis reads source code, which Python 3.11 cannot do in two.
        for lap in itertools.count():
            laps = [
                rounds(
                    url,
                    tally,
                    part=part,
                    seed=seed + lap,
                    examples=_EXAMPLES,
                    goes_on=self.goes_on,
                )
                for part, url in ports
            ]
            for _ in itertools.zip_longest(*laps):
                if not self.goes_on():
                    return

    def in_thread(self, tally: Tally, call: Callable[..., None], *arguments: Any) -> Thread:
        """Start `call` in a thread; if it breaks, less was sent than is said."""

        def run() -> None:
            try:
                call(*arguments)
            except Exception as error:
                tally.find("end", f"the fuzz itself failed: {type(error).__name__}", b"")
                raise

        thread = Thread(target=run)
        thread.start()
        return thread


def check_end(url: str, admin: str, tally: Tally) -> dict[str, float]:
    """Return the engine's figures once nothing runs; note what is not as before."""
    until = time.monotonic() + _SETTLE_S
    while (figures := _figures(admin)) and time.monotonic() < until:
        if not figures["running"] + figures["waiting"] and figures["free"] == figures["blocks"]:
            break
        time.sleep(0.2)
    else:
        tally.find("end", f"requests or blocks are left: {figures}", b"")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=30)
    if answer.status_code != 200:
        tally.find("end", f"a right request gets {answer.status_code} {answer.text[:300]}", b"")
    if httpx.get(f"{admin}/healthz", trust_env=False).status_code != 200:
        tally.find("end", "the engine is not alive", b"")
    return figures


_FIGURES = {
    "running": r"^vllm:num_requests_running\{.*\} (.*)$",
    "waiting": r"^vllm:num_requests_waiting\{.*\} (.*)$",
    "free": r"^mizzen:kv_blocks_free\{.*\} (.*)$",
    "blocks": r'^vllm:cache_config_info\{.*num_gpu_blocks="(\d+)".*$',
    "steps": r"^mizzen:engine_steps_total\{.*\} (.*)$",
}


def _figures(admin: str) -> dict[str, float]:
    text = httpx.get(f"{admin}/metrics", trust_env=False, timeout=30).text
    found = {name: re.search(each, text, re.MULTILINE) for name, each in _FIGURES.items()}
    return {name: float(match[1]) for name, match in found.items() if match}


def fuzz(minutes: float, seed: int, most: int, work: Path) -> dict[str, object]:
    model = write_tiny_model(work / "tiny", context=128)
    http, grpc, admin, front, front_health = free_ports(5)
    url, gateway, tally = f"http://127.0.0.1:{http}", f"http://127.0.0.1:{front}", Tally()
    serve = (
        *("serve", str(model), "--host=127.0.0.1", f"--port={http}", f"--grpc-port={grpc}"),
        *(f"--admin-port={admin}", "--device=cpu", "--dtype=float32", "--kv-cache-gib=0.02"),
    )
    door = (
        *("gateway", "--host=127.0.0.1", f"--port={front}", f"--metrics-port={front_health}"),
        *(f"--upstream=tiny={url}", "--auth=off", f"--batches-dir={work / 'batches'}"),
    )
    with started(work / "runtime.log", *serve) as runtime:
        wait_for(f"http://127.0.0.1:{admin}/readyz", runtime)
        with started(work / "gateway.log", *door) as at_door:
            wait_for(f"{gateway}/v1/models", at_door)
            began_at, run = time.monotonic(), Run(minutes=minutes, most=most)
            ports = (("described", url), ("described gateway", gateway))
            threads = [
                run.in_thread(tally, run.describe_to, tally, seed, *ports),
                *(
                    run.in_thread(tally, run.send_with, *senders)
                    for senders in _senders(url, gateway, grpc, tally, seed)
                ),
            ]
            for thread in threads:
                thread.join()
            took_s = time.monotonic() - began_at
            try:
                figures = check_end(url, f"http://127.0.0.1:{admin}", tally)
            except httpx.HTTPError as error:
                tally.find("end", f"the runtime does not answer: {error!r}", b"")
                figures = {}
            for name, process in (("runtime", runtime), ("gateway", at_door)):
                if process.poll() is not None:
                    tally.find("end", f"the {name} has exited with {process.returncode}", b"")
    return {
        "seed": seed,
        "seconds": round(took_s),
        "requests": tally.answers.total(),
        "answers": dict(sorted(tally.answers.items())),
        "engine_at_the_end": figures,
        "findings": tally.findings,
        "failures_in_logs": _tracebacks(work / "runtime.log") + _tracebacks(work / "gateway.log"),
    }


def _senders(
    url: str, gateway: str, grpc: int, tally: Tally, seed: int
) -> tuple[tuple[Sender, ...], ...]:
    def rng() -> Random:
        return Random(f"{seed}-{next(numbers)}")

    numbers = itertools.count()
    return (
        (
            HttpSender(url, tally, rng(), part="HTTP", infers=True),
            HttpSender(gateway, tally, rng(), part="gateway", infers=False),
        ),
        (
            GrpcSender(f"127.0.0.1:{grpc}", tally, rng()),
            SocketSender(_address(url), tally, rng(), part="socket"),
            SocketSender(_address(gateway), tally, rng(), part="gateway socket"),
        ),
    )


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 0


def _tracebacks(log: Path) -> list[str]:
    """Return the last line of each kind of traceback in a log."""
    parts = log.read_text(errors="replace").split("Traceback (most recent call last):")[1:]
    lasts = (re.search(r"^\w[\w.]*(Error|Exception|Group)\b.*$", part, re.M) for part in parts)
    return sorted({match[0][:300] for match in lasts if match})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_protocols")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--most-requests", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, help="folder for the logs, kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        summary = fuzz(options.minutes, options.seed, options.most_requests, work)
    print(json.dumps(summary, indent=1, ensure_ascii=True))
    return 1 if summary["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
