"""What the worker loop makes of a reconcile's result, in virtual time."""

import asyncio
from collections.abc import Callable

import pytest

from mizzen.operator.engine.backoff import Backoff
from mizzen.operator.engine.results import Done, Requeue, Result, Retryable, Terminal
from mizzen.operator.engine.resync import repeat
from mizzen.operator.engine.workers import run_workers
from mizzen.operator.engine.workqueue import Key, WorkQueue

pytestmark = pytest.mark.looptime

KEY = Key("llmdeployment", "default", "a")


class Results:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def reconciled(self, kind: str, result: str) -> None:
        self.seen.append(result)


async def times_of(results: list[Callable[[], Result]], *, for_s: float = 1000.0) -> list[float]:
    """Return when the key was reconciled, its results being these, then Done."""
    queue = WorkQueue(backoff=Backoff(jitter_ratio=0.0))
    loop = asyncio.get_running_loop()
    started, times = loop.time(), []

    async def reconcile(key: Key) -> Result:
        times.append(round(loop.time() - started, 1))
        return results.pop(0)() if results else Done()

    workers = asyncio.create_task(
        run_workers(queue, {"llmdeployment": reconcile}, count=2, observer=Results())
    )
    queue.add(KEY)
    await asyncio.sleep(for_s)
    workers.cancel()
    return times


def crash() -> Result:
    raise RuntimeError("a defect")


CASES: dict[str, tuple[list[Callable[[], Result]], list[float]]] = {
    "done is left alone": ([Done], [0.0]),
    "requeue comes when it asked for": ([lambda: Requeue(30)], [0.0, 30.0]),
    "retryable comes with growing pauses": (
        [lambda: Retryable(OSError("no answer"))] * 3,
        [0.0, 1.0, 3.0, 7.0],
    ),
    "but no later than something else is to be looked at": (
        [lambda: Retryable(OSError("no answer"), 5)] * 5,
        [0.0, 1.0, 3.0, 7.0, 12.0, 17.0],
    ),
    "a defect is retried like a failure": ([crash, crash], [0.0, 1.0, 3.0]),
    "terminal waits for a changed resource": ([lambda: Terminal(ValueError("bad"))], [0.0]),
    "a success between failures starts the pauses again": (
        [crash, crash, lambda: Requeue(10), crash],
        [0.0, 1.0, 3.0, 13.0, 14.0],
    ),
}


@pytest.mark.parametrize(("results", "expected"), CASES.values(), ids=CASES)
async def test_result(results: list[Callable[[], Result]], expected: list[float]) -> None:
    assert await times_of(list(results)) == expected


async def test_one_slow_key_does_not_hold_up_the_others() -> None:
    queue = WorkQueue()
    done: list[str] = []

    async def reconcile(key: Key) -> Result:
        await asyncio.sleep(100 if key.name == "slow" else 1)
        done.append(key.name)
        return Done()

    workers = asyncio.create_task(
        run_workers(queue, {"llmdeployment": reconcile}, count=2, observer=Results())
    )
    for name in ("slow", "b", "c", "d"):
        queue.add(Key("llmdeployment", "default", name))
    await asyncio.sleep(5)
    assert done == ["b", "c", "d"]
    workers.cancel()


async def test_closing_the_queue_lets_a_running_reconcile_end() -> None:
    queue = WorkQueue()
    done: list[str] = []

    async def reconcile(key: Key) -> Result:
        await asyncio.sleep(10)
        done.append(key.name)
        return Done()

    workers = asyncio.create_task(
        run_workers(queue, {"llmdeployment": reconcile}, count=2, observer=Results())
    )
    queue.add(KEY)
    await asyncio.sleep(1)
    queue.close()
    await asyncio.wait([workers], timeout=60)
    assert done == ["a"]
    assert workers.done()


async def test_a_failed_resync_is_tried_again_sooner() -> None:
    loop = asyncio.get_running_loop()
    started, times = loop.time(), []

    async def action() -> None:
        times.append(round(loop.time() - started))
        if len(times) == 2:
            raise OSError("no answer")

    task = asyncio.create_task(repeat(action, every_s=300, jitter_ratio=0.0))
    await asyncio.sleep(1000)
    task.cancel()
    assert times == [300, 600, 605, 905]
