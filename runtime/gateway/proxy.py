"""A request's way to a replica and back: choose, send, perhaps choose another, relay."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from aiohttp import ClientSession

from mizzen.runtime.gateway.admission import Admission, Search
from mizzen.runtime.gateway.affinity import SESSION_HEADER, affinity_key
from mizzen.runtime.gateway.asked import Asked
from mizzen.runtime.gateway.attempt import (
    AttemptError,
    FailureKind,
    Outgoing,
    Refusal,
    ReplicaTimeoutError,
    open_answer,
)
from mizzen.runtime.gateway.balancer import Balancer
from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.directory import Endpoint, Route, ServedModel
from mizzen.runtime.gateway.errors import GatewayError, NoReplicaError, ReplicaSilentError
from mizzen.runtime.gateway.headers import request_headers
from mizzen.runtime.gateway.metrics import GatewayMetrics
from mizzen.runtime.gateway.reply import Replying
from mizzen.runtime.gateway.room import Place
from mizzen.runtime.gateway.tokens import TokenMeter
from mizzen.runtime.tracing import current_span

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5
# Its schema has no priority: one runs as soon as it comes.
_WITHOUT_PRIORITY = "/v1/embeddings"
_Answer = TypeVar("_Answer")


class Proxy:
    """Sends requests to replicas so that one lost replica is no lost request."""

    def __init__(
        self,
        *,
        config: GatewayConfig,
        balancer: Balancer,
        admission: Admission,
        metrics: GatewayMetrics,
        session: ClientSession,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._balancer = balancer
        self._admission = admission
        self._metrics = metrics
        self._session = session
        self._clock = clock

    async def forward(
        self,
        asked: Asked,
        route: Route,
        reply: Replying[_Answer],
        meter: TokenMeter | None = None,
    ) -> _Answer:
        """Answer a request from one of the model's replicas, or say why none did."""
        search = _search(asked, route)
        outgoing = self._outgoing(asked, route)
        on_chunk = None if meter is None else meter.feed
        try:
            return await self._forward(outgoing, search, reply, on_chunk)
        except GatewayError as error:
            return await reply.fail(error)
        finally:
            self._admission.room.leave(search.place)

    async def _forward(
        self,
        outgoing: Outgoing,
        search: Search,
        reply: Replying[_Answer],
        on_chunk: Callable[[bytes], None] | None,
    ) -> _Answer:
        started_at = self._clock()
        route, span = search.route, current_span.get()
        model = route.model
        while True:
            endpoint = await self._admission.next_endpoint(search, reply)
            if endpoint is None:
                return await reply.refuse(_last_refusal(search))
            if search.last is not None:
                self._metrics.on_retry(model, search.last.kind.value)
            self._metrics.on_pick(model, endpoint.url)
            sent_at = self._clock()
            span.note({"server.address": endpoint.url})
            span.add({"mizzen.attempts": 1})
            with self._lease(model, endpoint):
                try:
                    answer = await open_answer(self._session, endpoint.url, outgoing)
                except AttemptError as failure:
                    self._note(endpoint, search, failure)
                    continue
                except ReplicaTimeoutError:
                    self._balancer.outliers.note_failure(endpoint.url)
                    self._count(route, endpoint, is_failure=True)
                    raise ReplicaSilentError(
                        f"A replica of {model.name!r} took the request and did not answer "
                        f"within {self._config.read_timeout_s:g} seconds."
                    ) from None
                took_s = self._clock() - started_at
                self._metrics.on_first_byte(model, took_s)
                span.note({"gen_ai.response.time_to_first_chunk": took_s})
                if isinstance(answer, Refusal):
                    self._judge(route, endpoint, answer)
                    return await reply.refuse(answer)
                self._balancer.outliers.note_success(endpoint.url)
                self._count(route, endpoint)
                self._metrics.on_begun(route, endpoint, self._clock() - sent_at)
                return await reply.relay(
                    answer,
                    on_cut=partial(self._on_cut, route, endpoint),
                    on_chunk=on_chunk,
                )

    @contextmanager
    def _lease(self, model: ServedModel, endpoint: Endpoint) -> Iterator[None]:
        """Count the request on its replica; when it ends there is room for one that waits."""
        try:
            with self._balancer.lease(endpoint.url):
                yield
        finally:
            self._admission.room.call_next(model.key)

    def _note(self, endpoint: Endpoint, search: Search, failure: AttemptError) -> None:
        if search.last is None:
            search.give_up_at = self._clock() + self._config.retry_window_s
        search.tried.add(endpoint.url)
        search.last = failure
        if failure.kind is FailureKind.LOST:
            search.resends += 1
        if failure.kind is FailureKind.BUSY:
            # A replica without an idle moment still has room for those who ask for text.
            if search.may_wait:
                self._balancer.note_busy(endpoint.url)
        else:
            self._balancer.outliers.note_failure(endpoint.url)
        if failure.kind in (FailureKind.UNREACHABLE, FailureKind.LOST):
            self._count(search.route, endpoint, is_failure=True)
        log.info(
            "model=%s/%s endpoint=%s not answered: %s (%s)",
            *search.route.model.key,
            endpoint.url,
            failure.kind.value,
            failure,
        )

    def _judge(self, route: Route, endpoint: Endpoint, refusal: Refusal) -> None:
        """An error that the request has earned is an answer; one of the replica's own is not."""
        self._count(route, endpoint, is_failure=refusal.status >= 500)
        if refusal.status < 500:
            self._balancer.outliers.note_success(endpoint.url)
        elif not route.is_on_trial:
            # An adapter on trial may bring its errors to every replica that it is on.
            self._balancer.outliers.note_error(endpoint.url)

    def _count(self, route: Route, endpoint: Endpoint, *, is_failure: bool = False) -> None:
        """Count a request for what answered it or did not."""
        self._metrics.on_taken(route, endpoint)
        if is_failure:
            self._metrics.on_failed(route, endpoint)

    def _on_cut(self, route: Route, endpoint: Endpoint, error: Exception) -> None:
        self._metrics.on_cut(route.model)
        self._metrics.on_failed(route, endpoint)
        current_span.get().failed("answer_cut")
        log.warning("model=%s/%s: an answer ended early: %s", *route.model.key, error)

    def _outgoing(self, asked: Asked, route: Route) -> Outgoing:
        headers = request_headers(
            asked.headers,
            request_id=asked.request_id,
            with_authorization=self._config.auth == "off",
        )
        # What the client said of its trace goes on as it came where there is no span here.
        headers.update(current_span.get().headers())
        return Outgoing(
            path=asked.path,
            headers=headers,
            body=asked.body.for_model(
                route.upstream_name,
                key_priority=None if asked.endpoint == _WITHOUT_PRIORITY else asked.priority,
            ),
            connect_timeout_s=self._config.connect_timeout_s,
            read_timeout_s=self._config.read_timeout_s,
        )


def _search(asked: Asked, route: Route) -> Search:
    body = asked.body
    session = asked.headers.get(SESSION_HEADER)
    return Search(
        route=route,
        key=affinity_key(body.document, model=route.upstream_name, session=session),
        may_wait=not body.is_for_idle_moments,
        place=Place(
            model=route.model.key,
            client=asked.client,
            priority=asked.priority,
            size_bytes=len(body.raw),
        ),
    )


def _last_refusal(search: Search) -> Refusal:
    """Return the last replica's own words for a request that is given up.

    Raises:
        NoReplicaError: it had none.
    """
    last = search.last
    if last is not None and last.refusal is not None:
        last.refusal.headers.setdefault("Retry-After", str(_RETRY_AFTER_S))
        return last.refusal
    kind = "" if last is None else f": the last one tried was {last.kind.value}"
    raise NoReplicaError(
        f"No replica of {search.route.model.name!r} answered{kind}. Try again in a few seconds.",
        retry_after_s=_RETRY_AFTER_S,
    )
