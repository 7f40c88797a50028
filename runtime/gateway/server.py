"""The gateway as one object with a start and an end; `main` runs it, tests embed it."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from pathlib import Path

from aiohttp import AddrInfoType, ClientSession, DummyCookieJar, TCPConnector, web

from mizzen.runtime.gateway.admission import Admission
from mizzen.runtime.gateway.app import Parts, build_app
from mizzen.runtime.gateway.balancer import Balancer
from mizzen.runtime.gateway.batches.runner import BatchRunner
from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.connections import Connections
from mizzen.runtime.gateway.directory import Directory, Endpoint, ServedModel
from mizzen.runtime.gateway.health import build_health_app
from mizzen.runtime.gateway.intake import Intake
from mizzen.runtime.gateway.keys import KEY_LABEL, Keyring, parse_lines
from mizzen.runtime.gateway.kube import KubeClient, connect, own_namespace
from mizzen.runtime.gateway.lifecycle import Lifecycle
from mizzen.runtime.gateway.limits import Accounts
from mizzen.runtime.gateway.metrics import GatewayMetrics
from mizzen.runtime.gateway.proxy import Proxy
from mizzen.runtime.gateway.quiet import server_log
from mizzen.runtime.gateway.reflector import Reflector
from mizzen.runtime.gateway.sinks import DEPLOYMENT_LABEL, KeySink, ModelSink, SliceSink
from mizzen.runtime.gateway.wake import Waker
from mizzen.runtime.tracing import start_tracing

log = logging.getLogger(__name__)

_KEEPALIVE_IDLE_S = 15
_LINGER_S = 5.0
_SETTLE_S = 0.2
_BACKLOG = 1024
_CLEANUP_S = 1.0
_HEADER_BYTES = 32 * 1024


class Gateway:
    """Watches, the two servers, and an orderly end."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.directory = Directory()
        self.keyring = Keyring()
        self.lifecycle = Lifecycle()
        self.balancer = Balancer(
            eject_s=config.eject_s,
            max_ejected_ratio=config.max_ejected_ratio,
            load_factor=config.load_factor,
            most_in_flight=config.replica_requests,
        )
        self.admission = Admission(config=config, directory=self.directory, balancer=self.balancer)
        self.directory.on_model_gone = self.admission.forget
        self.metrics = GatewayMetrics(self.directory, self.admission.room)
        self.accounts = Accounts(time.monotonic)
        self.connections = Connections(
            most=config.max_connections,
            request_timeout_s=config.header_timeout_s,
            idle_timeout_s=config.idle_timeout_s,
            stall_timeout_s=config.stall_timeout_s,
        )
        self.directory.on_endpoint_gone = self._forget_endpoint
        self._batch_made = asyncio.Event()
        self._tracing = start_tracing("mizzen-gateway")
        self._session: ClientSession | None = None
        self._kube: KubeClient | None = None
        self._api: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._listener: socket.socket | None = None
        self._health: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen on both ports and begin to watch; health answers before the first list is read."""
        config = self.config
        if config.keys_file is not None:
            lines = config.keys_file.read_text().splitlines()
            self.keyring.replace(str(config.keys_file), parse_lines(lines))
        if config.upstream:
            self._learn_upstreams()
        else:
            await self._begin_watching()
        self._session = _upstream_session()
        intake = self._intake(self._session)
        if config.batches_dir is not None:
            self._run_batches(config.batches_dir, intake)
        self._tasks.append(asyncio.create_task(self.admission.run(), name="those who wait"))
        self._health = web.AppRunner(
            build_health_app(self.lifecycle, self.metrics),
            access_log=None,
            shutdown_timeout=_CLEANUP_S,
        )
        self._api = web.AppRunner(
            build_app(self._parts(intake)),
            access_log=None,
            logger=server_log(),
            # A client that goes away cancels its request here, and with it the one upstream.
            handler_cancellation=True,
            shutdown_timeout=_CLEANUP_S,
            lingering_time=_LINGER_S,
            max_line_size=_HEADER_BYTES,
            max_field_size=_HEADER_BYTES,
        )
        await _listen(self._health, config.host, config.health_port)
        self._listener = await _listen(self._api, config.host, config.port)
        assert self._api.server is not None
        sweeping = self.connections.sweep(self._api.server)
        self._tasks.append(asyncio.create_task(sweeping, name="idle connections"))
        log.info("gateway listens on %s:%d, auth %s", config.host, self.port, config.auth)

    @property
    def port(self) -> int:
        """The API's port, also where the settings said 0."""
        assert self._api is not None
        return int(self._api.addresses[0][1])

    @property
    def metrics_port(self) -> int:
        """The health side's port, also where the settings said 0."""
        assert self._health is not None
        return int(self._health.addresses[0][1])

    async def drain(self) -> None:
        """Shut down gently: not ready, lame duck, then no new requests while open ones end."""
        self.lifecycle.is_draining = True
        log.info("shutting down: accepting for %g s more", self.config.lame_duck_s)
        await asyncio.sleep(self.config.lame_duck_s)
        if self._api is not None:
            await self._stop_listening(self._api)
            left = await self.lifecycle.wait_until_idle(self.config.drain_s)
            log.info("requests still open at the end: %d", left)
        await self.close()

    async def _stop_listening(self, api: web.AppRunner) -> None:
        # A connection whose server is closed between its accept and its set-up is never answered
        # nor closed (asyncio of Python 3.11): first take no more, then let the taken ones settle.
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
        await asyncio.sleep(_SETTLE_S)
        for site in list(api.sites):
            await site.stop()

    async def close(self) -> None:
        """Stop at once, whatever is open."""
        self.lifecycle.is_draining = True
        if self._api is not None and self._api.server is not None:
            await self._api.cleanup()
        tasks = [*self.lifecycle.tasks, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.admission.waker is not None:
            await self.admission.waker.close()
        if self._health is not None and self._health.server is not None:
            await self._health.cleanup()
        if self._session is not None:
            await self._session.close()
        if self._kube is not None:
            await self._kube.close()
        await asyncio.to_thread(self._tracing.close)

    def _parts(self, intake: Intake) -> Parts:
        return Parts(
            config=self.config,
            directory=self.directory,
            keyring=self.keyring,
            metrics=self.metrics,
            intake=intake,
            lifecycle=self.lifecycle,
            accounts=self.accounts,
            connections=self.connections,
            tracing=self._tracing,
            on_batch=self._batch_made.set,
        )

    def _intake(self, session: ClientSession) -> Intake:
        proxy = Proxy(
            config=self.config,
            balancer=self.balancer,
            admission=self.admission,
            metrics=self.metrics,
            session=session,
        )
        return Intake(
            directory=self.directory,
            lifecycle=self.lifecycle,
            metrics=self.metrics,
            proxy=proxy,
            most_answer_bytes=self.config.max_answer_mib * 2**20,
        )

    def _run_batches(self, root: Path, intake: Intake) -> None:
        runner = BatchRunner(
            root,
            config=self.config,
            intake=intake,
            keyring=self.keyring,
            accounts=self.accounts,
            lifecycle=self.lifecycle,
            metrics=self.metrics,
            batch_made=self._batch_made,
        )
        self._tasks.append(asyncio.create_task(runner.run(), name="batches"))

    def _learn_upstreams(self) -> None:
        urls: dict[str, list[str]] = {}
        for name, url in self.config.upstreams:
            urls.setdefault(name, []).append(url)
        for name, replicas in urls.items():
            model = ServedModel(namespace="local", deployment=name, name=name)
            self.directory.put_model(model)
            self.directory.put_slice(
                model.key,
                deployment=model.key,
                endpoints=tuple(Endpoint(url) for url in replicas),
            )

    async def _begin_watching(self) -> None:
        self._kube = await connect(self.config.kubeconfig)
        self.admission.waker = Waker(self._kube)
        self.lifecycle.reflectors = self._reflectors(self._kube)
        self.lifecycle.tasks = [
            asyncio.create_task(reflector.run(), name=f"watch {reflector.name}")
            for reflector in self.lifecycle.reflectors
        ]

    def _reflectors(self, kube: KubeClient) -> list[Reflector]:
        reflectors: list[Reflector] = []
        namespaces: list[str | None] = [*self.config.watch_namespaces]
        for namespace in namespaces or [None]:
            reflectors += self._reflectors_of(kube, namespace)
        if self.config.auth == "on":
            home = self.config.namespace or own_namespace()
            keys = Reflector(
                "api keys",
                kube,
                KeySink(self.keyring),
                path=f"/api/v1/namespaces/{home}/secrets",
                query={"labelSelector": f"{KEY_LABEL}=true"},
            )
            reflectors.append(keys)
        return reflectors

    def _reflectors_of(self, kube: KubeClient, namespace: str | None) -> list[Reflector]:
        scope = "" if namespace is None else f"/namespaces/{namespace}"
        models = Reflector(
            f"llmdeployments{scope}",
            kube,
            ModelSink(self.directory, namespace),
            path=f"/apis/mizzen.dev/v1alpha1{scope}/llmdeployments",
        )
        slices = Reflector(
            f"endpointslices{scope}",
            kube,
            SliceSink(self.directory, namespace),
            path=f"/apis/discovery.k8s.io/v1{scope}/endpointslices",
            query={"labelSelector": DEPLOYMENT_LABEL},
        )
        return [models, slices]

    def _forget_endpoint(self, url: str) -> None:
        self.balancer.forget(url)
        self.metrics.forget_endpoint(url)


def _upstream_session() -> ClientSession:
    return ClientSession(
        # The gateway's own clients are the only limit: a cap here would make them queue unseen.
        connector=TCPConnector(limit=0, keepalive_timeout=30, socket_factory=_socket),
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding", "User-Agent", "Content-Type"),
    )


def _socket(address: AddrInfoType) -> socket.socket:
    """Open a socket that notices a node that died without a word, within about a minute."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_IDLE_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return made


async def _listen(runner: web.AppRunner, host: str, port: int) -> socket.socket:
    await runner.setup()
    is_ipv6 = ":" in host
    listener = socket.create_server(
        (host, port),
        family=socket.AF_INET6 if is_ipv6 else socket.AF_INET,
        backlog=_BACKLOG,
        dualstack_ipv6=is_ipv6 and socket.has_dualstack_ipv6(),
    )
    await web.SockSite(runner, listener).start()
    return listener
