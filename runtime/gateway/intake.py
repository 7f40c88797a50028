"""What every request to a model goes through, whoever asks: a client, or a line of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from multidict import CIMultiDictProxy

from mizzen.runtime.gateway.body import Body
from mizzen.runtime.gateway.directory import Directory, Route
from mizzen.runtime.gateway.errors import NoReplicaError, UnknownModelError
from mizzen.runtime.gateway.lifecycle import Lifecycle
from mizzen.runtime.gateway.limits import Account
from mizzen.runtime.gateway.metrics import GatewayMetrics
from mizzen.runtime.gateway.proxy import Call, Proxy
from mizzen.runtime.gateway.reply import Replying
from mizzen.runtime.gateway.tokens import TokenMeter, expected_tokens

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a model, and by whom."""

    path: str
    headers: CIMultiDictProxy[str]
    body: Body
    request_id: str
    client: str = ""
    priority: int = 0
    account: Account | None = None


class Intake:
    """From a name in a request to its model's replicas, counted on the way."""

    def __init__(
        self,
        *,
        directory: Directory,
        lifecycle: Lifecycle,
        metrics: GatewayMetrics,
        proxy: Proxy,
    ) -> None:
        self._directory = directory
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._proxy = proxy

    def resolve(self, name: str) -> Route:
        """Return where requests for a model go.

        Raises:
            UnknownModelError, NoReplicaError: nowhere, or nowhere yet.
        """
        route = self._directory.resolve(name)
        if route is not None:
            return route
        if not self._lifecycle.is_synced():
            raise NoReplicaError("The gateway has just started; try again.", retry_after_s=1)
        raise UnknownModelError(name, self._directory.names())

    async def answer(self, asked: Asked, route: Route, reply: Replying[_Answer]) -> _Answer:
        """Have a request answered, and its tokens paid for by its key.

        Raises:
            RateLimitedError: the key has not that many left.
        """
        if asked.body.is_for_idle_moments:
            # No demand that anybody should scale for, so not counted as any.
            return await self._metered(asked, route, reply)
        self._metrics.on_start(route.model)
        try:
            return await self._metered(asked, route, reply)
        finally:
            self._metrics.on_end(route.model)

    async def _metered(self, asked: Asked, route: Route, reply: Replying[_Answer]) -> _Answer:
        account = asked.account
        if account is None or account.tokens is None:
            return await self._proxy.forward(_call(asked, route), reply)
        size_bytes = len(asked.body.raw)
        charged = account.charge_tokens(expected_tokens(asked.body.document, size_bytes))
        meter = TokenMeter(expected_tokens({}, size_bytes))
        try:
            return await self._proxy.forward(_call(asked, route, meter), reply)
        finally:
            account.settle_tokens(charged=charged, used=meter.used())


def _call(asked: Asked, route: Route, meter: TokenMeter | None = None) -> Call:
    return Call(
        path=asked.path,
        headers=asked.headers,
        route=route,
        body=asked.body,
        request_id=asked.request_id,
        client=asked.client,
        priority=asked.priority,
        meter=meter,
    )
