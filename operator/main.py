"""The operator process: wiring, leadership, start and shutdown order.

Only the leader watches and writes. It fills the store before the first reconcile, so that nothing
is decided on half a picture, and on the way out it lets running reconciles end before it gives
the Lease away.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import kopf

from mizzen.operator import handlers
from mizzen.operator.config import OperatorConfig
from mizzen.operator.controllers import finetunejob, llmdeployment
from mizzen.operator.controllers.autoscaler import Autoscaler
from mizzen.operator.controllers.capacity import Arbiter
from mizzen.operator.desired.routes import API_VERSIONS as ROUTE_KINDS
from mizzen.operator.engine.key import Key
from mizzen.operator.engine.lease import Lease, LeaseTimes
from mizzen.operator.engine.results import Result
from mizzen.operator.engine.resync import repeat
from mizzen.operator.engine.workers import Reconcile, run_workers
from mizzen.operator.engine.workqueue import WorkQueue
from mizzen.operator.facts import Facts
from mizzen.operator.gateway_api import GatewayApi
from mizzen.operator.health import Health, serve_health, watch_loop_lag
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.connect import open_client
from mizzen.operator.kube.documents import Json
from mizzen.operator.kube.errors import KubeError, NotFound
from mizzen.operator.kube.leases import LeaseObject
from mizzen.operator.kube.relist import relist
from mizzen.operator.kube.store import Store
from mizzen.operator.kube.transport import HttpTransport, Transport
from mizzen.operator.ledger import Ledger
from mizzen.operator.metrics.gateways import Gateways
from mizzen.operator.metrics.prometheus import PrometheusSource
from mizzen.operator.metrics.scrape import ScrapeSource
from mizzen.operator.metrics.source import MetricsSource
from mizzen.operator.namespaces import Namespaces
from mizzen.operator.nodes import NodeSizes
from mizzen.operator.routing import DEPLOYMENT, INDEXES, JOB, neighbours, route
from mizzen.operator.runtimes import HttpRuntimes
from mizzen.operator.specs import SpecCache
from mizzen.operator.telemetry import Telemetry, configure_logging
from mizzen.operator.trainers import TrainerClient

logger = logging.getLogger(__name__)

# An object deleted between our list and the watch's start is noticed by a relist this soon.
FIRST_RESYNC_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the process is made of."""

    config: OperatorConfig
    telemetry: Telemetry
    queue: WorkQueue
    store: Store
    kube: Kube
    facts: Facts
    autoscaler: Autoscaler
    arbiter: Arbiter
    metrics: MetricsSource
    lease: Lease
    health: Health


def assemble(config: OperatorConfig, transport: Transport) -> Parts:
    """Wire the parts together; nothing runs yet."""
    telemetry = Telemetry()
    queue = WorkQueue(observer=telemetry)
    store = Store(route, indexes=INDEXES)

    def look_at_neighbours(resource: Json) -> None:
        for key in neighbours(resource, store):
            queue.add(key)

    kube = Kube(
        transport,
        store,
        listed=frozenset({*(followed.kind for followed in handlers.FOLLOWED), *ROUTE_KINDS}),
        on_status=look_at_neighbours,
        observer=telemetry,
    )
    facts = Facts(
        config=config,
        store=store,
        specs=SpecCache(),
        runtimes=HttpRuntimes(config.admin_token_file),
        trainers=TrainerClient(config.admin_token_file),
        namespaces=Namespaces(config),
        nodes=NodeSizes(),
        gateway_api=GatewayApi(config),
        metrics=metrics_source(config, kube),
        ledger=Ledger(sees_nodes=None),
    )
    metrics = metrics_source(config, kube)
    autoscaler = Autoscaler(kube=kube, facts=facts, source=metrics, on_change=queue.add)
    times = LeaseTimes(
        duration_s=config.lease_duration_s,
        renew_s=config.lease_renew_s,
        retry_s=config.lease_retry_s,
    )
    lease_object = LeaseObject(transport, config.namespace, config.lease_name)
    lease = Lease(lease_object, config.identity, times)
    health = Health(config, queue, lease, store, telemetry)
    return Parts(
        config=config,
        telemetry=telemetry,
        queue=queue,
        store=store,
        kube=kube,
        facts=facts,
        autoscaler=autoscaler,
        arbiter=Arbiter(kube=kube, facts=facts, notes=lease, on_change=queue.add),
        metrics=metrics,
        lease=lease,
        health=health,
    )


def metrics_source(config: OperatorConfig, kube: Kube) -> MetricsSource:
    """Return where the load is read: Prometheus where one is named, else the processes."""
    if config.prometheus_url:
        return PrometheusSource(config.prometheus_url, scrape_s=config.metrics_interval_s)
    return ScrapeSource(Gateways(kube, config.namespace, time.monotonic))


def reconcilers(parts: Parts) -> dict[str, Reconcile]:
    """Return the reconcile function of each kind, with what it needs bound to it."""

    def bind(reconcile: Callable[..., Awaitable[Result]]) -> Reconcile:
        async def call(key: Key) -> Result:
            return await reconcile(key, kube=parts.kube, facts=parts.facts, now=datetime.now(UTC))

        return call

    async def reconcile_deployment(key: Key) -> Result:
        parts.autoscaler.notice(key)  # a wake should not wait for the next round
        return await bind(llmdeployment.reconcile)(key)

    return {DEPLOYMENT: reconcile_deployment, JOB: bind(finetunejob.reconcile)}


async def lead(parts: Parts, stop: asyncio.Event) -> None:
    """Do the leader's work until asked to stop or something it needs has ended."""
    await resync(parts)
    await look_at_gateway_api(parts)
    for followed in handlers.RESOURCES:
        for resource in parts.store.all(followed.kind):
            parts.queue.add(next(iter(route(resource))))
    stop_watching = asyncio.Event()
    workers = asyncio.create_task(
        run_workers(
            parts.queue,
            reconcilers(parts),
            count=parts.config.workers,
            observer=parts.telemetry,
        )
    )
    watching = asyncio.create_task(watch(parts, stop_watching))
    scaling = asyncio.create_task(
        parts.autoscaler.run(every_s=parts.config.autoscale_s, clock=partial(datetime.now, UTC))
    )
    lending = asyncio.create_task(
        parts.arbiter.run(every_s=parts.config.lending_s, clock=partial(datetime.now, UTC))
    )
    others = [
        scaling,
        lending,
        asyncio.create_task(parts.lease.keep()),
        asyncio.create_task(keep_in_step(parts)),
        asyncio.create_task(
            repeat(partial(look_at_gateway_api, parts), every_s=parts.config.gateway_api_s)
        ),
        asyncio.create_task(stop.wait()),
    ]
    ended, _ = await asyncio.wait([workers, watching, *others], return_when=asyncio.FIRST_COMPLETED)
    stop_watching.set()
    for writer in (scaling, lending):
        writer.cancel()  # they write too, and the Lease may be gone
    await finish(parts, workers)
    for task in others:
        task.cancel()
    await asyncio.wait([watching], timeout=parts.config.shutdown_s)
    for task in ended:
        if not task.cancelled() and (error := task.exception()):
            raise error


async def finish(parts: Parts, workers: "asyncio.Task[None]") -> None:
    """Hand out no more keys and let running reconciles end, within bounds."""
    parts.queue.close()
    if not parts.lease.is_held():
        workers.cancel()  # somebody else may lead already: not one more write
    _, running = await asyncio.wait([workers], timeout=parts.config.shutdown_s)
    for task in running:
        task.cancel()


async def watch(parts: Parts, stop: asyncio.Event) -> None:
    """Run Kopf as the informer."""
    namespaces = parts.config.watch_namespaces
    await kopf.operator(
        clusterwide=not namespaces,
        namespaces=namespaces,
        standalone=True,
        stop_flag=stop,
        memo=handlers.Memo(parts.store, parts.queue, parts.facts.specs),
    )


async def resync(parts: Parts) -> None:
    """Relist everything and look at all that was not as known."""
    concerned = await relist(
        parts.kube, handlers.FOLLOWED, namespaces=parts.config.watch_namespaces
    )
    for key in concerned:
        parts.queue.add(key)
    parts.health.last_resync_at = asyncio.get_running_loop().time()


async def look_at_gateway_api(parts: Parts) -> None:
    """See which of its kinds exist now and what became of our objects there."""
    for key in await parts.facts.gateway_api.look(parts.kube):
        parts.queue.add(key)


async def keep_in_step(parts: Parts) -> None:
    """Relist once soon after the start, then every few minutes."""
    await asyncio.sleep(FIRST_RESYNC_S)
    with contextlib.suppress(KubeError):
        await resync(parts)
    await repeat(partial(resync, parts), every_s=parts.config.resync_s)


async def wait_for_crds(parts: Parts) -> None:
    """Wait until the API server knows our resources, saying so meanwhile."""
    while True:
        try:
            for followed in handlers.RESOURCES:
                await parts.kube.list(
                    followed.api_version,
                    followed.kind,
                    namespace=next(iter(parts.config.watch_namespaces), ""),
                )
        except NotFound:
            parts.health.not_ready = (
                "The CustomResourceDefinitions of mizzen.dev are missing: install the chart with "
                "crds.install=true or apply manifests/crds."
            )
        except KubeError as error:
            parts.health.not_ready = str(error)
        else:
            parts.health.not_ready = ""
            return
        logger.warning(parts.health.not_ready)
        await asyncio.sleep(5)


async def run(config: OperatorConfig) -> None:
    """Run one operator process until SIGTERM, or until it lost the lead."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with await open_client() as client:
        parts = assemble(config, HttpTransport(client))
        runner = await serve_health(parts.health)
        lag = asyncio.create_task(watch_loop_lag(parts.telemetry))
        try:
            if await first_of(wait_for_crds(parts), stop) and await first_of(
                parts.lease.acquire(), stop
            ):
                await lead(parts, stop)
        finally:
            lag.cancel()
            await parts.lease.release()
            await hang_up(parts)
            await runner.cleanup()


async def hang_up(parts: Parts) -> None:
    """Close the connections to runtimes, trainers and whoever tells the load."""
    await parts.facts.runtimes.close()
    await parts.facts.trainers.close()
    await parts.metrics.close()
    await parts.facts.metrics.close()


async def first_of(work: Awaitable[None], stop: asyncio.Event) -> bool:
    """Wait for the work, or for the wish to stop; return whether the work was done."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    done, pending = await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    if working in done:
        working.result()
    return working in done


def main() -> None:
    """Entry of `mizzen operator`."""
    # The store's objects live long and hold no cycles. With Python's defaults a fifth of the
    # processor time goes into walking through them again and again.
    gc.set_threshold(50_000, 20, 100)
    config = OperatorConfig()
    configure_logging(form=config.log_format, level=config.log_level)
    asyncio.run(run(config))
