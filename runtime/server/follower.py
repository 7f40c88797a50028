"""`mizzen serve` in a pod that follows another: ranks of its own, and a port for probes alone."""

import asyncio
import logging
import os
from typing import TYPE_CHECKING, NoReturn

import uvloop
from starlette.requests import Request
from starlette.types import ASGIApp

from mizzen.runtime.config import ServeConfig
from mizzen.runtime.errors import MizzenError, RankLostError, report_fatal
from mizzen.runtime.parallel.nodes import reach_leader
from mizzen.runtime.server.access import Access, Gate
from mizzen.runtime.server.errors import ApiError
from mizzen.runtime.server.files import ModelFiles
from mizzen.runtime.server.listen import HttpServer, bind_port
from mizzen.runtime.server.routes import GuardedRoute, build_http_app, json_response
from mizzen.runtime.server.service import Phase
from mizzen.runtime.server.stopping import first_of, set_up_logging, stop_signals

if TYPE_CHECKING:
    from mizzen.runtime.parallel.follower import Follower

log = logging.getLogger(__name__)


def follow(config: ServeConfig) -> int:
    """Follow the leader until it ends the group; return the exit code."""
    set_up_logging()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                may_wait_for_threads = runner.run(FollowerServer(config).run())
            except RankLostError as error:
                _end_now(report_fatal(error))
            if not may_wait_for_threads:
                _end_now(0)
    except MizzenError as error:
        return report_fatal(error)
    return 0


def _end_now(exit_code: int) -> NoReturn:
    """End without waiting for threads.

    One may be in the middle of reading weights, wait for other pods, or for a lost rank in a
    collective: none of these can be ended, and waiting would outlast the pod's grace period.
    """
    logging.shutdown()
    os._exit(exit_code)


class FollowerServer:
    """The ranks of this pod and what its probes are told of them."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._follower: Follower | None = None
        self._has_joined = False
        self._stop_asked = asyncio.Event()

    async def run(self) -> bool:
        """Follow the leader until it ends the group; return whether every thread has ended.

        Raises:
            RankLostError: the group is lost.
            MizzenError: the model cannot be had, the port is taken, or the leader has other
                settings.
        """
        routes = [
            GuardedRoute("GET", "/healthz", self._healthz, Access.OPEN),
            GuardedRoute("GET", "/readyz", self._readyz, Access.OPEN),
        ]
        app = build_http_app(routes, gate=Gate(), render_error=_render_error)
        admin = HttpServer(app, bind_port(self._config.host, self._config.admin_port))
        work = asyncio.create_task(self._follow())
        try:
            with stop_signals(self._ask_to_stop):
                await first_of(work, self._stop_asked.wait())
            if not work.done():
                return False
            work.result()
            return True
        finally:
            await admin.stop(0)

    def _ask_to_stop(self) -> None:
        """Stop at once before the group is there; afterwards the leader has to finish first."""
        if self._has_joined:
            log.info("asked to stop: going on until the leader has finished its requests")
        else:
            self._stop_asked.set()

    async def _follow(self) -> None:
        config = await ModelFiles().bring(self._config)
        await asyncio.to_thread(self._run, config)

    def _run(self, config: ServeConfig) -> None:
        engine = config.engine_config()
        assert engine.nodes is not None, "only pods of a group follow"
        line = reach_leader(engine.nodes, engine.agreement)
        self._has_joined = True
        # Imported here because torch takes seconds, in which the port already answers.
        from mizzen.runtime.engine.startup import build_follower  # noqa: PLC0415

        self._follower = build_follower(engine)
        self._follower.run(line)

    async def _healthz(self, request: Request) -> ASGIApp:
        return json_response({"alive": True, "phase": self._phase})

    async def _readyz(self, request: Request) -> ASGIApp:
        ready = self._phase is Phase.SERVING
        body = {"ready": ready, "phase": self._phase}
        return json_response(body, status=200 if ready else 503)

    @property
    def _phase(self) -> Phase:
        is_serving = self._follower is not None and self._follower.is_serving
        return Phase.SERVING if is_serving else Phase.LOADING_MODEL


def _render_error(path: str, error: ApiError) -> dict[str, object]:
    return {"error": error.message}
