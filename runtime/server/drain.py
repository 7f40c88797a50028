"""The polite stop: stop looking ready, serve what still arrives, refuse, finish, end.

Endpoints propagate slowly: for a moment after readiness fell, clients still send here. Refusing
them at once would turn every planned stop into errors.
"""

import asyncio
import logging

from mizzen.runtime.server.service import Phase, Service

log = logging.getLogger(__name__)

_SEND_LIMIT_S = 10.0  # for clients that read their last bytes slowly or not at all


class Drain:
    """One stop, however many ask for it: SIGTERM joins a drain that /drain began."""

    def __init__(self, service: Service, *, lame_duck_s: float) -> None:
        self._service = service
        self._lame_duck_s = lame_duck_s
        self._task: asyncio.Task[None] | None = None

    def begin(self, timeout_s: float) -> None:
        """Begin to drain, or go on with the drain that has begun."""
        if self._task is None:
            log.info("draining: up to %.0f s for %d requests", timeout_s, self._service.in_flight())
            self._service.phase = Phase.LAME_DUCK
            self._task = asyncio.create_task(self._run(timeout_s), name="drain")

    async def wait(self) -> None:
        """Wait until nothing is in flight or the time is over. Needs `begin`."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def _run(self, timeout_s: float) -> None:
        await asyncio.sleep(self._lame_duck_s)
        self._service.phase = Phase.DRAINING
        if engine := self._service.engine_or_none:
            await engine.drain(timeout_s)
        # The engine is done when the last token is made; its client has yet to get it.
        try:
            async with asyncio.timeout(_SEND_LIMIT_S):
                await self._service.wait_until_sent()
        except TimeoutError:
            log.warning("drained with %d answers unsent", self._service.in_flight())
        log.info("drained")
