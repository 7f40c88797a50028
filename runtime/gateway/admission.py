"""Which replica a request tries next, and how long it waits for one."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from mizzen.runtime.gateway.attempt import AttemptError, FailureKind
from mizzen.runtime.gateway.balancer import Balancer
from mizzen.runtime.gateway.canary import CanaryTurns, sides
from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.directory import (
    Directory,
    Endpoint,
    EndpointState,
    ObjectKey,
    Route,
)
from mizzen.runtime.gateway.errors import BusyError, NoReplicaError
from mizzen.runtime.gateway.reply import Replying
from mizzen.runtime.gateway.room import Place, RoomFullError, WaitingRoom
from mizzen.runtime.gateway.starts import Starts
from mizzen.runtime.gateway.wake import Waker

_PAUSE_S = 0.25
_TICK_S = 0.5
_RETRY_AFTER_S = 5


@dataclass(slots=True)
class Search:
    """What one request looks for, and has tried so far."""

    route: Route
    key: int | None
    place: Place
    may_wait: bool = True  # and be waited for: a model wakes, or scales, for those who wait
    tried: set[str] = field(default_factory=set)
    resends: int = 0
    last: AttemptError | None = None
    # From the first failure on: a request may have waited long before its replica was lost.
    give_up_at: float = 0.0
    wait_until: float | None = None
    is_told_at: float = 0.0
    # Whether it is the canary's, once there was a choice.
    is_canarys: bool | None = None


class Admission:
    """Gives requests a replica at once where one has room, else in fair order as room comes."""

    def __init__(
        self,
        *,
        config: GatewayConfig,
        directory: Directory,
        balancer: Balancer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._directory = directory
        self._balancer = balancer
        self._clock = clock
        self._starts = Starts(clock)
        self._turns = CanaryTurns()
        self.waker: Waker | None = None
        self.room = WaitingRoom(
            max_requests=config.max_waiting, max_bytes=config.max_waiting_mib * 2**20
        )
        directory.on_change = self.room.stirred.set

    async def next_endpoint(self, search: Search, reply: Replying[object]) -> Endpoint | None:
        """Return the replica to try next, waiting for one while it is worth it; None to give up.

        Raises:
            NoReplicaError, BusyError: it cannot wait, or has waited long enough.
        """
        # A request that takes its replicas down must not be handed round all of them.
        while search.resends <= self._config.max_resends:
            if (endpoint := self._pick(search)) is not None:
                self.room.leave(search.place, served=True)
                return endpoint
            if self._is_retrying(search):
                left_s = search.give_up_at - self._clock()
                if left_s <= 0:
                    break
                await self._directory.wait_for_change(min(_PAUSE_S, left_s))
            elif not await self._wait(search, reply):
                break
            search.tried &= self._leaving(search)
        return None

    def _leaving(self, search: Search) -> set[str]:
        """Return the replicas that go away: what they have refused once they refuse for good."""
        found = self._directory.candidates(search.route)
        return {e.url for e in found if e.state is EndpointState.TERMINATING}

    def _pick(self, search: Search) -> Endpoint | None:
        if not self.room.may_go(search.route.model.key, search.place):
            return None
        for endpoints in self._sides(search):
            chosen = self._balancer.choose(endpoints, key=search.key, without=search.tried)
            if chosen is not None:
                return chosen
        return None

    def _sides(self, search: Search) -> tuple[tuple[Endpoint, ...], ...]:
        """Return the replicas that may be asked, those to be asked first before the others.

        What the canary cannot answer, what is proven does. The other way round only what failed
        goes: were a busy replica enough, the canary would get more than its share under load.
        """
        everyone = self._directory.candidates(search.route)
        model = self._directory.model(search.route.model.key)
        if model is None or model.canary is None:
            return (everyone,)
        canary, proven = sides(everyone, model)
        if not canary or not proven:
            return (everyone,)
        if search.is_canarys is None:
            search.is_canarys = self._turns.take(model)
        if search.is_canarys:
            return canary, proven
        have_failed = (
            search.last is not None
            and search.last.kind is not FailureKind.BUSY
            and all(endpoint.url in search.tried for endpoint in proven)
        )
        return (proven, canary) if have_failed and model.canary.weight else (proven,)

    def _is_retrying(self, search: Search) -> bool:
        """Whether replicas are there and the request has failed at them, not for want of room."""
        return (
            search.last is not None
            and search.last.kind is not FailureKind.BUSY
            and bool(search.tried)
            and bool(self._directory.ready_count(search.route.model.key))
        )

    # Waiting.

    async def _wait(self, search: Search, reply: Replying[object]) -> bool:
        """Wait for a turn; False when the last replica's refusal is to be the answer."""
        model = search.route.model
        # The last one on its way out serves what it still takes; the rest waits for the next one.
        is_starting = not self._directory.ready_count(model.key)
        config = self._config
        longest_s = config.hold_timeout_s if is_starting else config.queue_timeout_s
        now = self._clock()
        if not search.may_wait:
            return self._end_waiting(search, "has no ready replica now", is_starting=is_starting)
        if search.wait_until is None:
            search.wait_until, search.is_told_at = now + longest_s, now
        if is_starting and (why := self._why_never(model.key)) is not None:
            raise self._not_started(search, why)
        if now >= search.wait_until:
            return self._end_waiting(search, "has no ready replica now", is_starting=is_starting)
        try:
            self.room.enter(search.place)
        except RoomFullError as error:
            return self._end_waiting(search, f"is starting, and {error}", is_starting=is_starting)
        tell_at = search.is_told_at + config.progress_s
        await search.place.wait(max(0.0, min(search.wait_until, tell_at) - now))
        if self._clock() >= tell_at:
            search.is_told_at = self._clock()
            await reply.tell(self._news(search, is_starting=is_starting))
        return True

    def _end_waiting(self, search: Search, why: str, *, is_starting: bool) -> Literal[False]:
        if is_starting:
            raise self._not_started(search, why)
        if search.last is None or search.last.refusal is None:
            raise BusyError(
                f"All replicas of {search.route.model.name!r} are busy. Try again in a few "
                "seconds.",
                retry_after_s=_RETRY_AFTER_S,
            )
        return False

    def _news(self, search: Search, *, is_starting: bool) -> str:
        model = search.route.model
        held = self.room.held(model.key)
        if not is_starting:
            return f"all replicas of {model.name} are busy; {held} requests wait"
        longest_s = self._starts.longest_s(model.key, told_s=model.start_s)
        usual = "" if longest_s is None else f", which took up to {math.ceil(longest_s)} s lately"
        return f"{model.name} is starting{usual}; {held} requests wait"

    def _why_never(self, key: ObjectKey) -> str | None:
        """Say why no replica is to be expected, None where one is."""
        model = self._directory.model(key)
        if model is None:
            return "is no longer served"
        return "is switched off (spec.replicas is 0)" if model.is_off else None

    # Giving up.

    def _not_started(self, search: Search, why: str) -> NoReplicaError:
        model = search.route.model
        left_s = self._starts.left_s(model.key, told_s=model.start_s)
        return NoReplicaError(
            f"The model {model.name!r} {why}. Try again in {left_s} seconds; `kubectl -n "
            f"{model.namespace} describe llmdeployment {model.deployment}` says why.",
            retry_after_s=left_s,
        )

    # What goes on while requests wait.

    async def run(self) -> None:
        """Call those who wait when replicas come, wake models, measure starts; until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S if self._is_watching() else None):
                    await self.room.stirred.wait()
            self.room.stirred.clear()
            self._visit()

    def _is_watching(self) -> bool:
        return bool(self.room.waited_for() or self._starts.running())

    def _visit(self) -> None:
        for key in self._starts.running():
            if self._directory.ready_count(key):
                self._starts.note_ready(key)
                if self.waker is not None:
                    self.waker.forget(key)
        for key in self.room.waited_for():
            self.room.call_next(key)
            model = self._directory.model(key)
            if model is None or self._directory.ready_count(key):
                continue
            self._starts.note_wanted(key)
            if self.waker is not None and model.scales:
                self.waker.wake(key, self.room.held(key))

    def forget(self, key: ObjectKey) -> None:
        """Drop what is known of a model that is gone."""
        self._starts.forget(key)
        self._turns.forget(key)
        if self.waker is not None:
            self.waker.forget(key)
