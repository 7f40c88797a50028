"""The trainer's admin port: how far it is, and the polite way to make it stop.

Runs in a thread of its own, so that an answer never waits for a training step. `/healthz` and
`/metrics` are open; `/progress` and `/yield` need the installation's admin token.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.stop import StopFlag

log = logging.getLogger(__name__)

_GAUGES = {
    "mizzen_train_step": ("step", "Optimizer steps done."),
    "mizzen_train_total_steps": ("totalSteps", "Optimizer steps the job makes."),
    "mizzen_train_loss": ("loss", "Mean loss of the last step's scored tokens."),
    "mizzen_train_eval_loss": ("evalLoss", "Mean loss on the held-out samples."),
    "mizzen_train_reward": ("reward", "Mean reward of the last step's answers."),
    "mizzen_train_kl": ("kl", "How far the last step's answers drifted, in nats a token."),
    "mizzen_train_skipped_samples": ("skippedSamples", "Samples that gave no finite gradient."),
    "mizzen_train_learning_rate": ("learningRate", "Learning rate of the last step."),
    "mizzen_train_tokens": ("tokens", "Tokens trained on, over all generations."),
    "mizzen_train_tokens_per_second": ("tokensPerSecond", "Tokens a second, last 20 steps."),
    "mizzen_train_mfu_ratio": ("mfuRatio", "Speed over that of the devices' peak FLOP/s."),
    "mizzen_train_eta_seconds": ("etaSeconds", "Seconds of training left, from measured steps."),
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _BoardCollector(Collector):
    """Reads the gauges off the board when Prometheus asks."""

    def __init__(self, board: ProgressBoard) -> None:
        self._board = board

    def collect(self) -> Iterable[Metric]:
        document = self._board.document()
        for name, (field, text) in _GAUGES.items():
            # A gauge that is not known yet is absent: a zero would be a claim.
            if document[field] is not None:
                yield GaugeMetricFamily(name, text, value=float(document[field]))


class AdminServer:
    """Serves the admin port until the process ends."""

    def __init__(self, board: ProgressBoard, stop: StopFlag, *, token_file: Path) -> None:
        self._board = board
        self._stop = stop
        self._token_file = token_file
        self._registry = CollectorRegistry()
        self._registry.register(_BoardCollector(board))
        self._bound = threading.Event()
        self._fault: OSError | None = None
        self.port = 0

    def start(self, port: int) -> None:
        """Bind the port (0 lets the system choose) and return once it answers."""
        thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(port)), name="admin", daemon=True
        )
        thread.start()
        self._bound.wait()
        if self._fault is not None:
            raise self._fault

    async def _serve(self, port: int) -> None:
        runner = web.AppRunner(self._app(), access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "0.0.0.0", port)
        try:
            await site.start()
            self.port = runner.addresses[0][1]
        except OSError as error:
            self._fault = error
            return
        finally:
            self._bound.set()
        await asyncio.Event().wait()

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/progress", self._progress)
        app.router.add_post("/yield", self._yield)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in ("/healthz", "/metrics") and not self._is_admin(request):
            return web.json_response({"error": "The admin token is missing or wrong."}, status=401)
        return await handler(request)

    def _is_admin(self, request: web.Request) -> bool:
        """Compare with the token as mounted now: a rotated one counts without a restart."""
        try:
            token = self._token_file.read_text().strip()
        except OSError:
            return False  # without a token nobody is the administrator
        given = request.headers.get("Authorization", "")
        return bool(token) and hmac.compare_digest(given.encode(), f"Bearer {token}".encode())

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _progress(self, _: web.Request) -> web.Response:
        return web.json_response(self._board.document())

    async def _yield(self, request: web.Request) -> web.Response:
        """Accept at once; the loop stops at its next micro-batch and exits with 75."""
        try:
            body = await request.json() if request.can_read_body else {}
            deadline_s = float(body.get("deadlineSeconds", 0))
        except (ValueError, TypeError, AttributeError):
            return web.json_response(
                {"error": 'The body must be like {"deadlineSeconds": 15}.'}, status=400
            )
        log.info("Asked to yield within %g s.", deadline_s)
        # A little later, so that this answer is on its way even where stopping means leaving now.
        asyncio.get_running_loop().call_later(0.05, self._stop.ask)
        return web.json_response({"accepted": True}, status=202)
