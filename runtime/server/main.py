"""`mizzen serve`: the server's process, from its first port to its last answer."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvloop

from mizzen.runtime.config import ServeConfig
from mizzen.runtime.engine.api import EngineApi
from mizzen.runtime.engine.errors import EngineDeadError
from mizzen.runtime.engine.heap import give_back_freed
from mizzen.runtime.engine.remote import RemoteEngine
from mizzen.runtime.engine.spawn import EngineProcess
from mizzen.runtime.errors import MizzenError, report_fatal
from mizzen.runtime.server.access import Gate, SecretFile
from mizzen.runtime.server.adapters import load_listed
from mizzen.runtime.server.admin import build_admin_app
from mizzen.runtime.server.app import build_user_app
from mizzen.runtime.server.drain import Drain
from mizzen.runtime.server.grpc_server import build_grpc_server
from mizzen.runtime.server.listen import HttpServer, bind_port, port_taken
from mizzen.runtime.server.metrics import Metrics
from mizzen.runtime.server.service import Phase, Service
from mizzen.runtime.server.stopping import first_of, set_up_logging, stop_signals

log = logging.getLogger(__name__)

_GRACE_S = 2  # after the drain only answers that a client does not read are left
_LOOKS = 10  # in a row that find the engine's loop standing still, before it counts as dead
_LAST_WORDS_S = 1.0

StartEngine = Callable[[ServeConfig, Metrics], Awaitable[EngineApi]]


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a server listens in the end; a configured 0 becomes a free port."""

    http: int
    grpc: int
    admin: int


def serve(config: ServeConfig, process: EngineProcess) -> int:
    """Serve with the engine of `process` until told to stop; return the exit code."""
    set_up_logging()
    try:
        with process, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(Server(config, partial(start_engine, process)).run())
    except EngineDeadError as error:
        # A crash, not a mistake in the configuration: starting again may help.
        log.critical("ending: %s", error)
        return error.exit_code
    except MizzenError as error:
        return report_fatal(error)
    return 0


async def start_engine(process: EngineProcess, config: ServeConfig, metrics: Metrics) -> EngineApi:
    """Have the engine's process load the model; the ports answer meanwhile."""
    return await RemoteEngine.start(process, config.engine_config(), metrics)


class Server:
    """The three ports of a runtime and the order in which they open and close."""

    def __init__(
        self, config: ServeConfig, start_engine: StartEngine, *, dead_for_s: float = 5.0
    ) -> None:
        self._config = config
        self._start_engine = start_engine
        self._dead_for_s = dead_for_s
        metrics = Metrics(config.served_name)
        self.service = Service(config, metrics)
        metrics.observe(self.service)
        self.drain = Drain(self.service, lame_duck_s=config.lame_duck_seconds)
        self.bound = asyncio.Event()  # the ports are known and answer
        self.started = asyncio.Event()  # requests are served
        self.ports: Ports | None = None
        self._stop_asked = asyncio.Event()
        self._hurry = asyncio.Event()

    def ask_to_stop(self) -> None:
        """Begin the polite stop; asked again, end without waiting for what runs."""
        if self._stop_asked.is_set():
            self._hurry.set()
        self._stop_asked.set()

    async def run(self) -> None:
        """Serve until asked to stop.

        Raises:
            MizzenError: the model cannot be served, a port is taken, or the engine died.
        """
        gate = _build_gate(self._config)
        # Admin first: probes and metrics have to tell the truth while the model loads.
        admin_socket = bind_port(self._config.host, self._config.admin_port)
        http_socket = bind_port(self._config.host, self._config.port)
        grpc_server, grpc_port = self._bind_grpc(gate)
        self.ports = Ports(http_socket.getsockname()[1], grpc_port, admin_socket.getsockname()[1])
        admin = HttpServer(build_admin_app(self.service, gate, self.drain), admin_socket)
        users = HttpServer(build_user_app(self.service, gate), http_socket)
        await grpc_server.start()
        self.bound.set()
        with stop_signals(self.ask_to_stop):
            try:
                await self._serve()
            finally:
                grace_s = 0 if self._hurry.is_set() else _GRACE_S
                await users.stop(grace_s)
                await grpc_server.stop(grace=grace_s)
                await self._stop_engine()
                await admin.stop(grace_s)
                await asyncio.to_thread(self.service.tracing.close)

    async def _serve(self) -> None:
        loading = asyncio.create_task(self._load())
        try:
            await first_of(loading, self._stop_asked.wait())
            if loading.done():
                loading.result()
            died = asyncio.create_task(self._wait_until_dead())
            await first_of(self._stop_asked.wait(), died)
            if died.done():
                # Running requests get their error, and new ones theirs until endpoints are told.
                await asyncio.sleep(_LAST_WORDS_S)
                raise died.result()
            died.cancel()
            # A stop during loading has nobody to be polite to.
            if self.service.engine_or_none:
                self.drain.begin(self._config.drain_seconds)
                await first_of(self.drain.wait(), self._hurry.wait())
        finally:
            loading.cancel()

    async def _load(self) -> None:
        self._enter(Phase.LOADING_MODEL)
        config = await self.service.files.bring(self._config)
        engine = await self._start_engine(config, self.service.metrics)
        self.service.weights = config.model_path
        self.service.metrics.on_loaded(engine.model_len)
        self.service.attach(engine)
        if self.service.is_draining:
            await engine.drain(0)
        self._enter(Phase.LOADING_ADAPTERS)
        await load_listed(self.service, self._config.adapters_file)
        give_back_freed()  # half of what reading the tokenizer took
        self._enter(Phase.SERVING)
        log.info("serving %s on %s", self._config.served_name, self.ports)
        self.started.set()

    async def _wait_until_dead(self) -> MizzenError:
        # A liveness probe would end the process too, a minute later or, outside a cluster, never.
        # Looks are counted, not seconds: where all of the process stood still, the first look
        # comes before the engine had a chance to show itself.
        looks = 0
        while looks < _LOOKS:
            await asyncio.sleep(self._dead_for_s / _LOOKS)
            if death := self.service.engine.death():
                return death
            looks = 0 if self.service.is_alive() else looks + 1
        return EngineDeadError("The engine is dead, and only a new process helps.")

    def _enter(self, phase: Phase) -> None:
        # A drain may have begun meanwhile, and nothing goes back from there.
        if not self.service.is_draining:
            self.service.phase = phase

    async def _stop_engine(self) -> None:
        self.service.phase = Phase.STOPPED
        if engine := self.service.engine_or_none:
            await engine.stop()

    def _bind_grpc(self, gate: Gate) -> tuple[Any, int]:
        host, port = self._config.host, self._config.grpc_port
        try:
            return build_grpc_server(self.service, gate, host=host, port=port)
        except RuntimeError as error:
            raise port_taken(host, port, error) from error


def _build_gate(config: ServeConfig) -> Gate:
    return Gate(
        admin_token=SecretFile(config.admin_token_file) if config.admin_token_file else None,
        api_keys=SecretFile(config.api_key_file) if config.api_key_file else None,
    )
