"""Replicas that are simulated and report as real ones do, and a gateway that hands them requests.

A step costs a time of its own, more for every running sequence and for every prompt token. What is
measured goes through the runtime's and the gateway's own exporters, a port for all of them, with a
path each and a list of them that Prometheus' HTTP discovery reads.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from mizzen.runtime.engine.api import EngineStats, FinishedRequest
from mizzen.runtime.gateway.directory import Directory, ServedModel
from mizzen.runtime.gateway.metrics import GatewayMetrics
from mizzen.runtime.gateway.room import Place, WaitingRoom
from mizzen.runtime.server.metrics import Metrics

PROMPT_TOKENS, OUTPUT_TOKENS = 500, 200
STEP_S, SEQUENCE_S, PROMPT_TOKEN_S = 0.03, 0.000375, 0.00015
_PROMPTS_A_STEP = 4
_BLOCKS, _BLOCK_TOKENS = 8192, 16


@dataclass(slots=True)
class Request:
    """A request as it is answered; times are the process' monotonic clock's."""

    arrived_at: float
    begun_at: float = 0.0
    first_token_at: float = 0.0
    tokens: int = 0


@dataclass(slots=True)
class Replica:
    """One engine, and its exporter."""

    now: float
    on_end: Callable[[], None]
    metrics: Metrics = field(default_factory=lambda: Metrics("chat"))
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    phase: str = "serving"
    is_draining: bool = False

    def __post_init__(self) -> None:
        self.metrics.on_loaded(PROMPT_TOKENS + OUTPUT_TOKENS)
        self.metrics.observe(self)  # type: ignore[arg-type]

    @property
    def engine_or_none(self) -> Replica:
        return self

    def is_ready(self) -> bool:
        return True

    def stats(self) -> EngineStats:
        """Return what the exporter reads."""
        blocks = sum(PROMPT_TOKENS + r.tokens for r in self.running) // _BLOCK_TOKENS
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            blocks_total=_BLOCKS,
            blocks_free=_BLOCKS - blocks,
            kv_usage_ratio=blocks / _BLOCKS,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            preemptions=0,
            prefix_queries=self.prompt_tokens,
            prefix_hits=0,
            steps=self.steps,
            heartbeat_age_s=0.0,
            block_size=_BLOCK_TOKENS,
        )

    def compute_until(self, now: float) -> None:
        """Take steps until then."""
        while self.now < now and (self.running or self.waiting):
            self._step()
        self.now = max(self.now, now)

    def _step(self) -> None:
        new = [self.waiting.popleft() for _ in range(min(_PROMPTS_A_STEP, len(self.waiting)))]
        for request in new:
            request.begun_at = self.now
        self.running += new
        prompted = PROMPT_TOKENS * len(new)
        step_s = STEP_S + SEQUENCE_S * len(self.running) + PROMPT_TOKEN_S * prompted
        self.now += step_s
        self.steps += 1
        self.prompt_tokens += prompted
        self.generation_tokens += len(self.running)
        self.metrics.on_step(step_s, prompted + len(self.running) - len(new))
        for request in self.running:
            self._emit(request, step_s)
        self.running = [r for r in self.running if r.tokens < OUTPUT_TOKENS]

    def _emit(self, request: Request, step_s: float) -> None:
        request.tokens += 1
        if request.tokens == 1:
            request.first_token_at = self.now
            self.metrics.on_first_token(self.now - request.arrived_at)
        else:
            self.metrics.on_token(step_s)
        if request.tokens == OUTPUT_TOKENS:
            self.on_end()
            self.metrics.on_finish(
                FinishedRequest(
                    finish_reason="length",
                    prompt_tokens=PROMPT_TOKENS,
                    cached_tokens=0,
                    output_tokens=OUTPUT_TOKENS,
                    e2e_s=self.now - request.arrived_at,
                    queue_s=request.begun_at - request.arrived_at,
                    prefill_s=request.first_token_at - request.begun_at,
                    decode_s=self.now - request.first_token_at,
                )
            )


class Fleet:
    """The replicas of one deployment, by pod, and the gateway before them."""

    def __init__(self, namespace: str, name: str) -> None:
        self.model = ServedModel(namespace, name, name=name, scales=True)
        directory = Directory()
        directory.put_model(self.model)
        self.room = WaitingRoom(max_requests=1024, max_bytes=64 << 20)
        self.gateway = GatewayMetrics(directory, self.room)
        self.replicas: dict[str, Replica] = {}
        self.requests_per_s = 0.0
        self.is_observable = True
        self._leaving: list[Replica] = []
        self._held: list[tuple[Place, Request]] = []
        self._worked_at = time.monotonic()

    @property
    def held(self) -> int:
        """How many requests wait for a replica."""
        return len(self._held)

    def set_pods(self, ready: set[str]) -> None:
        """Take which pods are in service; others finish what they have."""
        for pod in self.replicas.keys() - ready:
            self._leaving.append(self.replicas.pop(pod))
        for pod in ready - self.replicas.keys():
            self.replicas[pod] = Replica(time.monotonic(), lambda: self.gateway.on_end(self.model))

    def ask(self) -> None:
        """Let a request arrive."""
        request = Request(time.monotonic())
        self.gateway.on_start(self.model)
        if self.replicas:
            self._place(request)
            return
        place = Place(self.model.key, client="", priority=0, size_bytes=1024)
        self.room.enter(place)
        self._held.append((place, request))

    def work(self) -> None:
        """Let the time since the last call go by."""
        now = time.monotonic()
        expected = self.requests_per_s * (now - self._worked_at)
        self._worked_at = now
        for _ in range(int(expected) + (random.random() < expected % 1)):
            self.ask()
        while self._held and self.replicas:
            place, request = self._held.pop(0)
            self.room.leave(place, served=True)
            self._place(request)
        for replica in (*self.replicas.values(), *self._leaving):
            replica.compute_until(now)
        self._leaving = [r for r in self._leaving if r.running or r.waiting]

    def _place(self, request: Request) -> None:
        freest = min(self.replicas.values(), key=lambda r: len(r.running) + len(r.waiting))
        freest.waiting.append(request)

    async def answer(self, request: web.BaseRequest) -> web.Response:
        """Answer Prometheus: the list of targets, or one of them."""
        if request.path == "/targets":
            return web.json_response([self._target(request.host, pod) for pod in self.replicas])
        if not self.is_observable:
            return web.Response(status=503)
        registry = self._registry(request.path.removeprefix("/"))
        if registry is None:
            return web.Response(status=404)
        return web.Response(text=generate_latest(registry).decode())

    def _registry(self, name: str) -> CollectorRegistry | None:
        if name == "gateway":
            return self.gateway.registry
        replica = self.replicas.get(name)
        return replica.metrics.registry if replica else None

    def _target(self, host: str, pod: str) -> dict[str, Any]:
        labels = {"namespace": self.model.namespace, "mizzen_dev_deployment": self.model.deployment}
        return {"targets": [host], "labels": {"__metrics_path__": f"/{pod}", "pod": pod} | labels}


def scrape_configuration(address: str, *, every_s: int) -> dict[str, object]:
    """Return the Prometheus configuration that reads a fleet which answers at HOST:PORT."""
    gateway = {
        **{"job_name": "gateway", "metrics_path": "/gateway", "honor_labels": True},
        "static_configs": [{"targets": [address]}],
    }
    discovery = {"url": f"http://{address}/targets", "refresh_interval": "1s"}
    runtimes = {"job_name": "runtimes", "http_sd_configs": [discovery]}
    return {
        "global": {"scrape_interval": f"{every_s}s", "scrape_timeout": "3s"},
        "scrape_configs": [gateway, runtimes],
    }
