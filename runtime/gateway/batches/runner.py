"""Takes up batches that nobody runs, and asks for their lines behind everybody else's requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from multidict import CIMultiDict, CIMultiDictProxy

from mizzen.runtime.gateway.asked import Asked
from mizzen.runtime.gateway.batches.collected import Collected, failed
from mizzen.runtime.gateway.batches.job import Job, Work
from mizzen.runtime.gateway.batches.lines import Line, LineAnswer
from mizzen.runtime.gateway.batches.records import Batch
from mizzen.runtime.gateway.batches.shelf import (
    Claim,
    Shelf,
    claim,
    open_batches,
    remove_expired,
)
from mizzen.runtime.gateway.body import parse_body
from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.errors import GatewayError, RateLimitedError
from mizzen.runtime.gateway.intake import Intake
from mizzen.runtime.gateway.keys import Keyring
from mizzen.runtime.gateway.lifecycle import Lifecycle
from mizzen.runtime.gateway.limits import Account, Accounts, Limits
from mizzen.runtime.gateway.metrics import GatewayMetrics

log = logging.getLogger(__name__)

# Below every priority that a key can have, in the gateway and in the runtime.
BACKGROUND_PRIORITY = -1000
DAY_S = 86400
_SCAN_S = 2.0
_CLEAN_EVERY_S = 3600.0
_MOST_JOBS = 16
_WAITS = (429, 503)
_FAILURES = 3
_HEADERS = CIMultiDictProxy(CIMultiDict({"Content-Type": "application/json"}))


class BatchRunner:
    """Runs the batches of a volume, as many lines at a time as the settings say."""

    def __init__(
        self,
        root: Path,
        *,
        config: GatewayConfig,
        intake: Intake,
        keyring: Keyring,
        accounts: Accounts,
        lifecycle: Lifecycle,
        metrics: GatewayMetrics,
        batch_made: asyncio.Event,
        now_s: Callable[[], int] = lambda: int(time.time()),
        longest_wait_s: float = 30.0,
    ) -> None:
        self._root = root
        self._config = config
        self._intake = intake
        self._keyring = keyring
        self._accounts = accounts
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._now_s = now_s
        self._longest_wait_s = longest_wait_s
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._batch_made = batch_made
        self._slots = asyncio.Semaphore(config.batches_parallel)
        self._work = Work(
            ask=self._ask,
            parallel=config.batches_parallel,
            is_draining=lambda: lifecycle.is_draining,
            has_key=self._has_key,
            now_s=now_s,
            most_lines=config.batches_max_lines,
            most_line_bytes=config.max_body_mib * 2**20,
            keep_s=config.batches_keep_days * DAY_S,
        )

    async def run(self) -> None:
        """Look for batches to run, until cancelled."""
        clean_at = 0.0
        try:
            while True:
                try:
                    if time.monotonic() >= clean_at:
                        clean_at = time.monotonic() + _CLEAN_EVERY_S
                        await asyncio.to_thread(self._clean)
                    await self._take_up()
                except OSError as error:
                    log.error("batches wait, their volume fails: %s", error)
                await self._pause()
        finally:
            for job in self._jobs.values():
                job.cancel()
            await asyncio.gather(*self._jobs.values(), return_exceptions=True)

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_SCAN_S):
                await self._batch_made.wait()
        self._batch_made.clear()

    def _clean(self) -> None:
        remove_expired(self._root, now_s=self._now_s(), keep_s=self._work.keep_s)

    async def _take_up(self) -> None:
        # Keys that are not read yet would look like keys that are gone.
        if self._lifecycle.is_draining or not self._lifecycle.is_synced():
            return
        for batch_id in await asyncio.to_thread(open_batches, self._root):
            if len(self._jobs) >= _MOST_JOBS:
                return
            if batch_id in self._jobs:
                continue
            claimed = await asyncio.to_thread(claim, self._root, batch_id)
            if claimed is not None:
                job = asyncio.create_task(self._run(claimed), name=batch_id)
                self._jobs[batch_id] = job
                job.add_done_callback(self._forget)

    def _forget(self, job: asyncio.Task[None]) -> None:
        del self._jobs[job.get_name()]

    async def _run(self, claimed: Claim) -> None:
        shelf = Shelf(self._root, claimed.owner)
        try:
            batch = await asyncio.to_thread(shelf.batch, claimed.batch_id)
            if batch is None:
                if claimed.is_stray():
                    claimed.finish()
                return
            if not batch.is_ended:
                job = Job(shelf, batch, self._work)
                await job.run()
                batch = job.batch
            if batch.is_ended:
                claimed.finish()
        except* OSError as errors:
            log.error("batch %s waits, its volume fails: %s", claimed.batch_id, errors.exceptions)
        except* Exception:
            log.exception("batch %s failed inside the gateway", claimed.batch_id)
        finally:
            claimed.release()

    def _has_key(self, owner: str) -> bool:
        return self._config.auth == "off" or self._keyring.limits(owner) is not None

    # One line.

    async def _ask(self, batch: Batch, line: Line, request_id: str) -> LineAnswer | None:
        """Ask until there is an answer, None once this gateway leaves.

        Who is refused for want of room comes back.
        """
        failures, uncharged = 0, 1
        while True:
            # Not held while a line waits to come back: other keys' lines run meanwhile.
            async with self._slots:
                if self._lifecycle.is_draining:
                    return None
                account = self._account(batch.owner)
                try:
                    if account is not None:
                        account.take_background(requests=uncharged)
                        uncharged = 0
                except RateLimitedError as error:
                    answer = failed(error)
                else:
                    with self._lifecycle.open_request():
                        answer = await self._ask_once(batch, line, request_id, account)
            if answer.status in _WAITS:
                await self._wait(answer.retry_after_s)
            elif answer.status < 500 or (failures := failures + 1) == _FAILURES:
                return answer

    def _account(self, owner: str) -> Account | None:
        limits = self._keyring.limits(owner) or Limits()
        return self._accounts.of(owner, limits) if limits != Limits() else None

    async def _wait(self, retry_after_s: float | None) -> None:
        if not self._lifecycle.is_draining:
            await asyncio.sleep(min(retry_after_s or 1.0, self._longest_wait_s))

    async def _ask_once(
        self, batch: Batch, line: Line, request_id: str, account: Account | None
    ) -> LineAnswer:
        most_bytes = self._config.max_answer_mib * 2**20
        try:
            body = parse_body(line.raw_body())
            route = self._intake.resolve(body.model)
            asked = Asked(
                path=batch.endpoint,
                headers=_HEADERS,
                body=body,
                request_id=request_id,
                client=batch.owner,
                priority=BACKGROUND_PRIORITY,
                account=account,
            )
            answer = await self._intake.answer(asked, route, Collected(most_bytes))
        except GatewayError as error:
            return failed(error)
        except Exception:
            # Of this line only: it would take the others of its batch with it.
            log.exception("a line of %s failed inside the gateway as %s", batch.id, request_id)
            return failed(GatewayError(f"The gateway failed; its log says why under {request_id}."))
        self._metrics.on_answer(route.model, answer.status)
        return answer
