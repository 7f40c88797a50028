"""Port 8002: metrics and health, not for clients."""

from __future__ import annotations

import json

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from mizzen.runtime.gateway.lifecycle import Lifecycle
from mizzen.runtime.gateway.metrics import GatewayMetrics


def build_health_app(lifecycle: Lifecycle, metrics: GatewayMetrics) -> web.Application:
    """Return the application for probes and Prometheus."""

    async def healthz(request: web.Request) -> web.Response:
        # An API server that is away is no reason to restart: that would lose what is known.
        broken = lifecycle.broken()
        return _json(
            200 if broken is None else 503, {"watches": lifecycle.watches(), "broken": broken}
        )

    async def readyz(request: web.Request) -> web.Response:
        waiting = [r.name for r in lifecycle.reflectors if not r.is_synced]
        ready = not waiting and not lifecycle.is_draining
        return _json(
            200 if ready else 503,
            {"ready": ready, "draining": lifecycle.is_draining, "waitingFor": waiting},
        )

    async def metrics_page(request: web.Request) -> web.Response:
        page = generate_latest(metrics.registry)
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics_page)
    return app


def _json(status: int, document: object) -> web.Response:
    return web.Response(
        status=status, body=json.dumps(document).encode(), content_type="application/json"
    )
