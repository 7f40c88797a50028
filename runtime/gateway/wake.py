"""The one thing the gateway writes: an annotation that asks for a model at zero to be started.

`mizzen.dev/wake: <time>;held=<N>` on the LLMDeployment, by field manager mizzen-gateway: when
somebody waited last, and how many requests wait at this gateway. The operator does the rest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from aiohttp import ClientError

from mizzen.runtime.gateway.directory import ObjectKey
from mizzen.runtime.gateway.kube import KubeError, KubeObject

log = logging.getLogger(__name__)

WAKE_ANNOTATION = "mizzen.dev/wake"
FIELD_MANAGER = "mizzen-gateway"
# The first request wakes at once. Later ones change only the size of what is started.
_NEWS_S = 5.0
_REMINDER_S = 30.0


class Patcher(Protocol):
    """What waking needs of an API server."""

    async def merge(self, path: str, patch: KubeObject) -> object:
        """Apply a merge patch."""
        ...


def wake_value(now: datetime, held: int) -> str:
    """Return the annotation's value: RFC 3339 with whole seconds, and the number held."""
    return f"{now.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ};held={held}"


def wake_path(model: ObjectKey) -> str:
    """Return where the annotation goes."""
    namespace, name = model
    return (
        f"/apis/mizzen.dev/v1alpha1/namespaces/{namespace}/llmdeployments/{name}"
        f"?fieldManager={FIELD_MANAGER}"
    )


class Waker:
    """Writes wakes, seldom enough for a thousand requests to be a few writes."""

    def __init__(
        self,
        patcher: Patcher,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._patcher = patcher
        self._clock = clock
        self._now = now
        self._written: dict[ObjectKey, tuple[float, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def wake(self, model: ObjectKey, held: int) -> None:
        """Ask for the model, unless it was asked for a moment ago."""
        at, said = self._written.get(model, (-_REMINDER_S, -1))
        age_s = self._clock() - at
        if age_s < _NEWS_S or (held == said and age_s < _REMINDER_S):
            return
        self._written[model] = (self._clock(), held)
        task = asyncio.create_task(self._write(model, held), name=f"wake {model}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget(self, model: ObjectKey) -> None:
        """A replica is ready: the next wake is a new one."""
        self._written.pop(model, None)

    async def close(self) -> None:
        """Let what is being written end."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self, model: ObjectKey, held: int) -> None:
        value = wake_value(self._now(), held)
        patch = {"metadata": {"annotations": {WAKE_ANNOTATION: value}}}
        try:
            await self._patcher.merge(wake_path(model), patch)
        except (KubeError, ClientError, OSError, TimeoutError) as error:
            log.warning("cannot wake %s/%s: %s; trying again", *model, error)
            self._written[model] = (self._clock(), -1)
