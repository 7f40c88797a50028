"""Leader election in virtual time: never two leaders, and always one again."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from mizzen.operator.engine.lease import Lease, LeaseTimes

pytestmark = pytest.mark.looptime

Json = dict[str, Any]
TIMES = LeaseTimes(duration_s=15, renew_s=10, retry_s=2)


class Server:
    """One Lease object with optimistic locking; can refuse to answer, or to answer some."""

    def __init__(self) -> None:
        self.lease: Json | None = None
        self.silent_to: set[str] = set()

    def api(self, identity: str) -> "Client":
        return Client(self, identity)


class Client:
    def __init__(self, server: Server, identity: str) -> None:
        self.server = server
        self.identity = identity

    async def read(self) -> Json | None:
        await self._travel()
        return self.server.lease

    async def write(
        self, spec: Json, *, annotations: dict[str, str], previous: Json | None
    ) -> Json | None:
        await self._travel()
        now = self.server.lease
        if now != previous:
            return None
        version = int(now["metadata"]["resourceVersion"]) if now else 0
        metadata = {"resourceVersion": str(version + 1), "annotations": annotations}
        self.server.lease = {"metadata": metadata, "spec": spec}
        return self.server.lease

    async def _travel(self) -> None:
        await asyncio.sleep(0.1)
        if self.identity in self.server.silent_to:
            await asyncio.sleep(1000)


def candidate(server: Server, identity: str, *, wrong_clock: bool = False) -> Lease:
    year = 1999 if wrong_clock else 2026
    return Lease(
        server.api(identity), identity, TIMES, wall_clock=lambda: datetime(year, 1, 1, tzinfo=UTC)
    )


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_the_first_candidate_leads_and_the_second_waits() -> None:
    server = Server()
    first, second = candidate(server, "a"), candidate(server, "b")
    await first.acquire()
    keeping = asyncio.create_task(first.keep())
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(300)
    assert first.is_held()
    assert not waiting.done()
    keeping.cancel()
    waiting.cancel()


async def test_of_two_that_come_at_once_one_leads() -> None:
    server = Server()
    both = [candidate(server, "a"), candidate(server, "b")]
    tasks = [asyncio.create_task(one.acquire()) for one in both]
    await asyncio.sleep(5)
    assert [one.is_held() for one in both].count(True) == 1
    for task in tasks:
        task.cancel()


async def test_a_leader_that_died_is_followed_after_the_duration() -> None:
    server = Server()
    await candidate(server, "a").acquire()
    started = now()
    await candidate(server, "b").acquire()
    assert 15 <= now() - started < 15 + 2 * TIMES.retry_s + 1


async def test_a_leader_that_released_is_followed_at_once() -> None:
    server = Server()
    first, second = candidate(server, "a"), candidate(server, "b")
    await first.acquire()
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(5)
    await first.release()
    released = now()
    await waiting
    assert now() - released <= TIMES.retry_s + 1
    assert not first.is_held()


async def test_a_leader_cut_off_gives_up_before_another_may_start() -> None:
    server = Server()
    first, second = candidate(server, "a"), candidate(server, "b")
    await first.acquire()
    keeping = asyncio.create_task(first.keep())
    taking = asyncio.create_task(second.acquire())
    await asyncio.sleep(60)
    server.silent_to.add("a")
    gave_up_at = started_at = None
    for _ in range(400):
        await asyncio.sleep(0.1)
        assert not (first.is_held() and second.is_held())
        if gave_up_at is None and keeping.done():
            gave_up_at = now()
        if started_at is None and second.is_held():
            started_at = now()
    assert gave_up_at is not None
    assert started_at is not None
    assert gave_up_at <= started_at
    await taking


async def test_one_lost_renewal_is_survived() -> None:
    server = Server()
    leader = candidate(server, "a")
    await leader.acquire()
    keeping = asyncio.create_task(leader.keep())
    await asyncio.sleep(10)
    server.silent_to.add("a")
    await asyncio.sleep(3)
    server.silent_to.clear()
    await asyncio.sleep(60)
    assert leader.is_held()
    keeping.cancel()


async def test_clocks_of_different_machines_are_never_compared() -> None:
    server = Server()
    await (first := candidate(server, "a")).acquire()
    keeping = asyncio.create_task(first.keep())
    stranger = candidate(server, "b", wrong_clock=True)
    waiting = asyncio.create_task(stranger.acquire())
    await asyncio.sleep(120)
    assert not waiting.done()
    keeping.cancel()
    waiting.cancel()


async def test_a_takeover_counts_a_transition_and_a_renewal_does_not() -> None:
    server = Server()
    await (first := candidate(server, "a")).acquire()
    keeping = asyncio.create_task(first.keep())
    await asyncio.sleep(30)
    assert server.lease is not None
    assert server.lease["spec"]["leaseTransitions"] == 1
    keeping.cancel()
    await candidate(server, "b").acquire()
    assert server.lease["spec"]["leaseTransitions"] == 2


@pytest.mark.parametrize("does_release", [True, False])
async def test_what_a_leader_noted_is_read_by_its_followers_and_costs_no_write(
    does_release: bool,
) -> None:
    server = Server()
    first, second, third = (candidate(server, name) for name in "abc")
    await first.acquire()
    assert first.noted("used") == ""
    keeping = asyncio.create_task(first.keep())
    await asyncio.sleep(60)
    assert server.lease is not None
    before = int(server.lease["metadata"]["resourceVersion"])
    for number in range(60):
        first.note("used", str(number))
        await asyncio.sleep(1)
    assert int(server.lease["metadata"]["resourceVersion"]) - before <= 60 / TIMES.retry_s + 1
    await asyncio.sleep(5)
    keeping.cancel()
    if does_release:
        first.note("used", "last")  # since its last renewal
        await first.release()
    await second.acquire()
    assert second.noted("used") == ("last" if does_release else "59")
    await second.release()  # it has nothing to say
    await third.acquire()
    assert third.noted("used") == second.noted("used")
    third.note("used", "own")
    assert third.noted("used") == "own"


async def test_annotations_of_others_on_the_lease_stay() -> None:
    server = Server()
    await (first := candidate(server, "a")).acquire()
    assert server.lease is not None
    server.lease["metadata"]["annotations"]["theirs"] = "kept"
    first.note("ours", "too")
    keeping = asyncio.create_task(first.keep())
    await asyncio.sleep(5)
    keeping.cancel()
    assert server.lease["metadata"]["annotations"] == {"theirs": "kept", "ours": "too"}
