"""A request's way to a replica and back: choose, send, perhaps choose another, relay."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from aiohttp import ClientSession, web

from mizzen.runtime.gateway.affinity import SESSION_HEADER, affinity_key
from mizzen.runtime.gateway.attempt import (
    AttemptError,
    FailureKind,
    Outgoing,
    Refusal,
    ReplicaTimeoutError,
    open_answer,
)
from mizzen.runtime.gateway.balancer import Balancer
from mizzen.runtime.gateway.body import Body
from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.directory import Directory, Endpoint, Route
from mizzen.runtime.gateway.errors import NoReplicaError, ReplicaSilentError
from mizzen.runtime.gateway.headers import request_headers
from mizzen.runtime.gateway.metrics import GatewayMetrics
from mizzen.runtime.gateway.reply import Reply

log = logging.getLogger(__name__)

_PAUSE_S = 0.25
_RETRY_AFTER_S = 5


@dataclass(slots=True)
class Search:
    """What one request looks for, and has tried so far."""

    key: int | None = None
    tried: set[str] = field(default_factory=set)
    resends: int = 0
    last: AttemptError | None = None
    # From the first failure on: a request may have waited long before its replica was lost.
    give_up_at: float = 0.0


class Proxy:
    """Sends requests to replicas so that one lost replica is no lost request."""

    def __init__(
        self,
        *,
        config: GatewayConfig,
        directory: Directory,
        balancer: Balancer,
        metrics: GatewayMetrics,
        session: ClientSession,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._directory = directory
        self._balancer = balancer
        self._metrics = metrics
        self._session = session
        self._clock = clock

    async def forward(
        self, request: web.Request, route: Route, body: Body, *, request_id: str
    ) -> web.StreamResponse:
        """Answer `request` from one of the model's replicas.

        Raises:
            NoReplicaError: no replica took it.
            ReplicaSilentError: one took it and fell silent.
        """
        started_at = self._clock()
        outgoing = self._outgoing(request, body.for_model(route.upstream_name), request_id)
        reply = Reply(request)
        search = Search(_affinity(request, route, body))
        while True:
            endpoint = await self._next_endpoint(route, search)
            if endpoint is None:
                return reply.refuse(self._give_up(route, search))
            if search.last is not None:
                self._metrics.on_retry(route.model, search.last.kind.value)
            self._metrics.on_pick(route.model, endpoint.url)
            with self._balancer.lease(endpoint.url):
                try:
                    answer = await open_answer(self._session, endpoint.url, outgoing)
                except AttemptError as failure:
                    self._note(route, endpoint, search, failure)
                    continue
                except ReplicaTimeoutError:
                    self._balancer.outliers.note_failure(endpoint.url)
                    raise ReplicaSilentError(
                        f"A replica of {route.model.name!r} took the request and did not answer "
                        f"within {self._config.read_timeout_s:g} seconds."
                    ) from None
                self._metrics.on_first_byte(route.model, self._clock() - started_at)
                if isinstance(answer, Refusal):
                    self._judge(endpoint, answer)
                    return reply.refuse(answer)
                self._balancer.outliers.note_success(endpoint.url)
                return await reply.relay(answer, on_cut=partial(self._on_cut, route))

    # Choosing.

    async def _next_endpoint(self, route: Route, search: Search) -> Endpoint | None:
        """Return the replica to try next, waiting for one while it is worth it; None to give up."""
        # A request that takes its replicas down must not be handed round all of them.
        while search.resends <= self._config.max_resends:
            endpoint = self._balancer.choose(
                self._directory.candidates(route), key=search.key, without=search.tried
            )
            if endpoint is not None or search.last is None:
                return endpoint
            # Every replica known was tried. Waiting helps where another is on its way to being
            # ready; it does not where all of them are busy.
            left_s = search.give_up_at - self._clock()
            if left_s <= 0 or search.last.kind is FailureKind.BUSY:
                break
            await self._directory.wait_for_change(min(_PAUSE_S, left_s))
            search.tried.clear()
        return None

    def _note(
        self, route: Route, endpoint: Endpoint, search: Search, failure: AttemptError
    ) -> None:
        if search.last is None:
            search.give_up_at = self._clock() + self._config.retry_window_s
        search.tried.add(endpoint.url)
        search.last = failure
        if failure.kind is FailureKind.LOST:
            search.resends += 1
        if failure.kind is not FailureKind.BUSY:
            self._balancer.outliers.note_failure(endpoint.url)
        log.info(
            "model=%s/%s endpoint=%s not answered: %s (%s)",
            *route.model.key,
            endpoint.url,
            failure.kind.value,
            failure,
        )

    def _judge(self, endpoint: Endpoint, refusal: Refusal) -> None:
        """An error that the request has earned is an answer; one of the replica's own is not."""
        if refusal.status >= 500:
            self._balancer.outliers.note_error(endpoint.url)
        else:
            self._balancer.outliers.note_success(endpoint.url)

    def _give_up(self, route: Route, search: Search) -> Refusal:
        name = route.model.name
        if search.last is None:
            raise NoReplicaError(
                f"The model {name!r} has no ready replica now. Try again in a few seconds; "
                f"`kubectl -n {route.model.namespace} describe llmdeployment "
                f"{route.model.deployment}` says why.",
                retry_after_s=_RETRY_AFTER_S,
            )
        if search.last.refusal is not None:
            refusal = search.last.refusal
            refusal.headers.setdefault("Retry-After", str(_RETRY_AFTER_S))
            return refusal
        raise NoReplicaError(
            f"No replica of {name!r} answered: the last one tried was {search.last.kind.value}. "
            "Try again in a few seconds.",
            retry_after_s=_RETRY_AFTER_S,
        )

    # Sending and relaying.

    def _on_cut(self, route: Route, error: Exception) -> None:
        self._metrics.on_cut(route.model)
        log.warning("model=%s/%s lost its replica in mid-answer: %s", *route.model.key, error)

    def _outgoing(self, request: web.Request, body: bytes, request_id: str) -> Outgoing:
        return Outgoing(
            path=request.rel_url.raw_path_qs,
            headers=request_headers(
                request.headers,
                request_id=request_id,
                with_authorization=self._config.auth == "off",
            ),
            body=body,
            connect_timeout_s=self._config.connect_timeout_s,
            read_timeout_s=self._config.read_timeout_s,
        )


def _affinity(request: web.Request, route: Route, body: Body) -> int | None:
    session = request.headers.get(SESSION_HEADER)
    return affinity_key(body.document, model=route.upstream_name, session=session)
