"""The worker loop: take a key, reconcile it, act on the result.

The operator's one broad `except` lives here.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from mizzen.operator.engine.key import Key
from mizzen.operator.engine.results import Done, Requeue, Result, Retryable, Terminal
from mizzen.operator.engine.workqueue import WorkQueue

logger = logging.getLogger(__name__)

Reconcile = Callable[[Key], Awaitable[Result]]


class ReconcileObserver(Protocol):
    """Gets told how reconciles end; telemetry implements it."""

    def reconciled(self, kind: str, result: str) -> None:
        """A reconcile of `kind` ended as done, requeue, retryable, terminal or crashed."""


async def run_workers(
    queue: WorkQueue,
    reconcilers: Mapping[str, Reconcile],
    *,
    count: int,
    observer: ReconcileObserver,
) -> None:
    """Run `count` workers until cancelled or the queue is closed."""
    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(_work(queue, reconcilers, observer), name=f"worker-{index}")


async def _work(
    queue: WorkQueue, reconcilers: Mapping[str, Reconcile], observer: ReconcileObserver
) -> None:
    while True:
        key = await queue.get()
        try:
            await handle(key, queue, reconcilers[key.kind], observer)
        finally:
            queue.done(key)


async def handle(
    key: Key, queue: WorkQueue, reconcile: Reconcile, observer: ReconcileObserver
) -> None:
    """Reconcile one key and put it back as its result asks."""
    try:
        result = await reconcile(key)
    except Exception as defect:
        # A defect of ours: the key must not be lost with it, nor the other keys stopped.
        logger.exception("reconcile crashed", extra={"key": str(key)})
        observer.reconciled(key.kind, "crashed")
        result = Retryable(defect)
    else:
        observer.reconciled(key.kind, type(result).__name__.lower())
    match result:
        case Done():
            queue.succeed(key)
        case Requeue(after_s):
            queue.succeed(key)
            queue.add(key, after_s)
        case Retryable(error, within_s):
            pause_s = queue.retry(key)
            if within_s is not None:
                queue.add(key, within_s)
            logger.warning(
                "reconcile will be retried",
                extra={"key": str(key), "error": str(error), "pause_s": round(pause_s, 1)},
            )
        case Terminal(error):
            queue.succeed(key)
            logger.error(
                "reconcile needs a changed resource", extra={"key": str(key), "error": str(error)}
            )
