"""The work queue, in virtual time: a second here takes no time."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mizzen.operator.engine.backoff import Backoff
from mizzen.operator.engine.workqueue import Key, WorkQueue

pytestmark = pytest.mark.looptime

A, B = Key("llmdeployment", "default", "a"), Key("llmdeployment", "default", "b")


def make_queue() -> WorkQueue:
    return WorkQueue(backoff=Backoff(jitter_ratio=0.0))


def now() -> float:
    return asyncio.get_running_loop().time()


async def take(queue: WorkQueue, *, within_s: float = 0.01) -> Key | None:
    """Return the key that becomes due within that time, None if none does."""
    try:
        return await asyncio.wait_for(queue.get(), within_s)
    except TimeoutError:
        return None


async def test_a_burst_on_one_key_is_handed_out_once() -> None:
    queue = make_queue()
    for _ in range(200):
        queue.add(A)
    assert await take(queue) == A
    queue.done(A)
    assert await take(queue) is None


async def test_keys_come_out_in_the_order_they_became_due() -> None:
    queue = make_queue()
    queue.add(A, 2.0)
    queue.add(B, 1.0)
    assert [await take(queue, within_s=5), await take(queue, within_s=5)] == [B, A]


async def test_a_key_in_a_workers_hands_is_not_given_to_another() -> None:
    queue = make_queue()
    queue.add(A)
    assert await take(queue) == A
    queue.add(A)
    assert await take(queue, within_s=60) is None


async def test_a_key_added_while_worked_on_comes_again_afterwards() -> None:
    queue = make_queue()
    queue.add(A)
    await take(queue)
    queue.add(A)
    queue.add(A)
    queue.done(A)
    assert await take(queue) == A
    queue.done(A)
    assert await take(queue) is None


async def test_a_delayed_key_that_falls_due_while_worked_on_comes_again_afterwards() -> None:
    queue = make_queue()
    queue.add(A)
    await take(queue)
    queue.add(A, 1.0)
    await asyncio.sleep(5)
    assert await take(queue) is None
    queue.done(A)
    assert await take(queue) == A


async def test_a_delay_starts_with_the_first_event_of_a_burst() -> None:
    queue = make_queue()
    started = now()
    for _ in range(10):
        queue.add(A, 0.5)
        await asyncio.sleep(0.1)
    assert await take(queue, within_s=5) == A
    assert now() - started == pytest.approx(1.0, abs=0.01)


async def test_an_earlier_time_wins_over_a_later_one() -> None:
    queue = make_queue()
    started = now()
    queue.add(A, 60)
    queue.add(A, 1)
    queue.add(A, 30)
    assert await take(queue, within_s=100) == A
    assert now() - started == pytest.approx(1.0)
    queue.done(A)
    assert await take(queue, within_s=100) is None


async def test_an_immediate_add_overtakes_a_delay() -> None:
    queue = make_queue()
    queue.add(A, 60)
    queue.add(A)
    assert await take(queue) == A
    queue.done(A)
    assert await take(queue, within_s=100) is None


async def test_failures_in_a_row_wait_longer_each_time_up_to_a_bound() -> None:
    queue = make_queue()
    pauses = []
    for _ in range(11):
        pauses.append(queue.retry(A))
        await take(queue, within_s=1000)
        queue.done(A)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


async def test_a_success_starts_the_pauses_again() -> None:
    queue = make_queue()
    queue.retry(A)
    queue.retry(A)
    queue.succeed(A)
    assert queue.retry(A) == 1


async def test_one_keys_failures_do_not_slow_another_key() -> None:
    queue = make_queue()
    queue.retry(A)
    queue.retry(A)
    assert queue.retry(B) == 1


def test_jitter_spreads_pauses_around_their_length() -> None:
    backoff = Backoff(jitter_ratio=0.2, rng=random.Random(1))
    pauses = [backoff.delay_s(3) for _ in range(100)]
    assert 3.2 <= min(pauses) < 3.4
    assert 4.6 < max(pauses) <= 4.8


async def test_age_and_work_time_are_those_of_the_oldest() -> None:
    queue = make_queue()
    queue.add(A)
    await asyncio.sleep(3)
    queue.add(B)
    await asyncio.sleep(2)
    assert queue.oldest_age_s() == pytest.approx(5)
    await take(queue)
    await asyncio.sleep(4)
    assert queue.longest_work_s() == pytest.approx(4)


async def test_a_waiting_worker_that_is_cancelled_takes_no_key_with_it() -> None:
    queue = make_queue()
    leaving = asyncio.create_task(queue.get())
    staying = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add(A)  # wakes the first of the two
    leaving.cancel()
    assert await asyncio.wait_for(staying, 1) == A


async def test_a_closed_queue_wakes_its_workers_and_hands_out_nothing() -> None:
    queue = make_queue()
    worker = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.close()
    with pytest.raises(asyncio.CancelledError):
        await worker
    queue.add(A)
    assert len(queue) == 0


async def test_a_key_leaves_no_trace() -> None:
    queue = make_queue()
    queue.add(A, 1)
    await take(queue, within_s=5)
    queue.done(A)
    queue.succeed(A)
    held = [value for value in vars(queue).values() if isinstance(value, dict)]
    assert held
    assert not any(held)


ACTIONS = st.lists(
    st.tuples(st.sampled_from("abc"), st.floats(0, 3), st.floats(0, 2)), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS)
def test_no_change_is_missed_and_no_key_is_worked_on_twice_at_once(
    actions: list[tuple[str, float, float]],
) -> None:
    """Whatever is added when: each key is worked on once more after its last change."""
    looptime = pytest.importorskip("looptime")

    async def play() -> None:
        queue = make_queue()
        changed: dict[Key, int] = {}
        seen: dict[Key, int] = {}
        busy: set[Key] = set()

        async def work() -> None:
            while True:
                key = await queue.get()
                assert key not in busy
                busy.add(key)
                seen[key] = changed[key]
                await asyncio.sleep(0.7)
                busy.discard(key)
                queue.done(key)

        workers = [asyncio.create_task(work()) for _ in range(3)]
        for name, after_s, pause_s in actions:
            key = Key("llmdeployment", "default", name)
            changed[key] = changed.get(key, 0) + 1
            queue.add(key, after_s)
            await asyncio.sleep(pause_s)
        await asyncio.sleep(60)
        for worker in workers:
            assert not worker.done()
            worker.cancel()
        assert seen == changed

    loop = looptime.new_event_loop()
    try:
        loop.run_until_complete(play())
    finally:
        loop.close()
