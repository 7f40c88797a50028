"""/healthz, /readyz and /metrics of the operator, on one port.

Healthy means that work moves: a process that answers while its queue stands still is not.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from mizzen.operator.config import OperatorConfig
from mizzen.operator.engine.lease import Lease
from mizzen.operator.engine.workqueue import WorkQueue
from mizzen.operator.kube.store import Store
from mizzen.operator.runtimes import LONGEST_CALL_S
from mizzen.operator.telemetry import Telemetry


@dataclass(slots=True)
class Health:
    """What the probes ask. `main` fills it in as the process comes up."""

    config: OperatorConfig
    queue: WorkQueue
    lease: Lease
    store: Store
    telemetry: Telemetry
    # Why the operator cannot work yet, empty when it can.
    not_ready: str = "starting"
    last_resync_at: float | None = None

    def problem(self) -> str:
        """Return what is wrong with a process that should be restarted, empty if nothing is."""
        # A reconcile that waits for a runtime is not stuck, and ending it would begin it anew.
        working_s = self.queue.longest_work_s() - LONGEST_CALL_S
        stuck_s = max(self.queue.oldest_age_s(), working_s)
        if stuck_s > self.config.stuck_after_s:
            return f"work stands still for {stuck_s:.0f} s"
        if self.resync_age_s() > 3 * self.config.resync_s + 60:
            return "the last full relist is too long ago"
        return ""

    def resync_age_s(self) -> float:
        """Return the seconds since the last full relist, 0 for a process that does not lead."""
        if self.last_resync_at is None:
            return 0.0
        return asyncio.get_running_loop().time() - self.last_resync_at

    def refresh_metrics(self) -> None:
        """Set the gauges that are read only when somebody asks."""
        self.telemetry.depth.set(len(self.queue))
        self.telemetry.oldest.set(self.queue.oldest_age_s())
        self.telemetry.longest.set(self.queue.longest_work_s())
        self.telemetry.objects.set(len(self.store))
        self.telemetry.resync_age.set(self.resync_age_s())
        self.telemetry.leader.set(int(self.lease.is_held()))


def build_app(health: Health) -> web.Application:
    """Return the web application of the three paths."""

    async def metrics(_: web.Request) -> web.Response:
        health.refresh_metrics()
        return web.Response(body=health.telemetry.render(), content_type="text/plain")

    app = web.Application()
    app.router.add_get("/healthz", _probe(health.problem))
    app.router.add_get("/readyz", _probe(lambda: health.not_ready))
    app.router.add_get("/metrics", metrics)
    return app


def _probe(
    problem: Callable[[], str],
) -> Callable[[web.Request], "asyncio.Future[web.Response]"]:
    async def answer(_: web.Request) -> web.Response:
        found = problem()
        return web.Response(status=503 if found else 200, text=found or "ok")

    return answer  # type: ignore[return-value]


async def serve_health(health: Health) -> web.AppRunner:
    """Start serving; the caller cleans the runner up."""
    runner = web.AppRunner(build_app(health), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, health.config.health_host, health.config.health_port).start()
    return runner


async def watch_loop_lag(telemetry: Telemetry, *, every_s: float = 1.0) -> None:
    """Measure how late the event loop is: a blocking call shows here first."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + every_s
        await asyncio.sleep(every_s)
        telemetry.loop_lag.set(max(0.0, loop.time() - due))
