"""What every request to a model goes through, whoever asks: a client, or a line of a batch."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TypeVar

from mizzen.runtime.gateway.asked import Asked
from mizzen.runtime.gateway.body import Body
from mizzen.runtime.gateway.directory import Directory, Route, ServedModel
from mizzen.runtime.gateway.errors import BadBodyError, NoReplicaError, UnknownModelError
from mizzen.runtime.gateway.guarded import GuardedReply
from mizzen.runtime.gateway.guardrails import (
    RefusedByGuardrailError,
    check_request,
    refuse_scores,
    refuse_streamed_logprobs,
)
from mizzen.runtime.gateway.lifecycle import Lifecycle
from mizzen.runtime.gateway.metrics import GatewayMetrics
from mizzen.runtime.gateway.prompts import apply_prompt
from mizzen.runtime.gateway.proxy import Proxy
from mizzen.runtime.gateway.reply import Replying
from mizzen.runtime.gateway.tokens import TokenMeter, expected_tokens

_Answer = TypeVar("_Answer")


class Intake:
    """From a name in a request to its model's replicas, counted on the way."""

    def __init__(
        self,
        *,
        directory: Directory,
        lifecycle: Lifecycle,
        metrics: GatewayMetrics,
        proxy: Proxy,
        most_answer_bytes: int,
    ) -> None:
        self._directory = directory
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._proxy = proxy
        self._most_answer_bytes = most_answer_bytes

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
            BadPromptError, RefusedByGuardrailError, GuardrailFailedError: as the model's spec says.
            BadBodyError: it is nested too deeply for that.
        """
        if asked.body.is_for_idle_moments:
            # No demand that anybody should scale for, so not counted as any.
            return await self._metered(self._checked(asked, route.model), route, reply)
        self._metrics.on_start(route.model)
        try:
            checked = self._checked(asked, route.model)
            return await self._metered(checked, route, self._guarded(reply, route.model))
        finally:
            self._metrics.on_end(route.model)

    def _checked(self, asked: Asked, model: ServedModel) -> Asked:
        """Apply the model's guardrails and templates, in this order: a template is trusted."""
        body = asked.body
        try:
            document = check_request(body.document, model.guardrails)
            refuse_streamed_logprobs(body.document, model.guardrails)
            if body.is_for_idle_moments:
                refuse_scores(model.guardrails)
        except RefusedByGuardrailError as error:
            self._metrics.on_guardrail(model, error.guardrail)
            raise
        except RecursionError:
            message = "The request is nested too deeply to be checked: make it flatter."
            raise BadBodyError(message) from None
        document = apply_prompt(document, model.prompts, path=asked.endpoint)
        if document is body.document:
            return asked
        return replace(asked, body=Body(json.dumps(document).encode(), document, body.model))

    def _guarded(self, reply: Replying[_Answer], model: ServedModel) -> Replying[_Answer]:
        rails = [rail for rail in model.guardrails if rail.is_output]
        if not rails:
            return reply
        return GuardedReply(
            reply,
            rails,
            most_bytes=self._most_answer_bytes,
            on_hit=lambda rail: self._metrics.on_guardrail(model, rail.name),
        )

    async def _metered(self, asked: Asked, route: Route, reply: Replying[_Answer]) -> _Answer:
        account = asked.account
        if account is None or account.tokens is None:
            return await self._proxy.forward(asked, route, reply)
        size_bytes = len(asked.body.raw)
        charged = account.charge_tokens(expected_tokens(asked.body.document, size_bytes))
        meter = TokenMeter(expected_tokens({}, size_bytes))
        try:
            return await self._proxy.forward(asked, route, reply, meter)
        finally:
            account.settle_tokens(charged=charged, used=meter.used())
