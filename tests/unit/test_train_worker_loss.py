"""What a worker does when it hears that another is gone. No processes are started."""

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mizzen.runtime.errors import EXIT_RANK_LOST
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.line import Line
from mizzen.runtime.train import workers
from mizzen.runtime.train.stop import StopFlag
from mizzen.runtime.train.workers import Workers


class Ends:
    """Takes down how the process would have ended; none of its tests waits for a commit."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.has_come = threading.Event()
        self.waits_for_commit = threading.Event()
        self.has_committed = threading.Event()

    def leave(self, code: int) -> None:
        self.codes.append(code)
        self.has_come.set()

    def sleep(self, _: float) -> None:
        self.waits_for_commit.set()
        self.has_committed.wait(60)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    made = Ends()
    monkeypatch.setattr(workers, "leave", made.leave)
    monkeypatch.setattr(workers, "time", SimpleNamespace(sleep=made.sleep))
    return made


@pytest.fixture
def lines() -> Iterator[tuple[Line, Line]]:
    """The leader's end of a connection, and the other's."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        theirs = Line(socket.create_connection(door.getsockname()), "Pod 0")
        ours = Line(door.accept()[0], "Pod 1")
    yield ours, theirs
    ours.close()
    theirs.close()


def test_a_leader_that_has_made_no_step_yet_waits_for_no_commit(
    ends: Ends, lines: tuple[Line, Line]
) -> None:
    ours, theirs = lines
    stop = StopFlag()
    # As where workers only play roles: nothing is summed with them, so no group breaks.
    group = Workers(data=RankGroup(rank=0), lines=[ours])
    with stop.nothing_to_lose():
        group.watch(stop)
        theirs.close()
        assert ends.has_come.wait(60)
    assert ends.codes == [EXIT_RANK_LOST]
    assert not ends.waits_for_commit.is_set()


def test_a_leader_at_work_has_the_time_to_commit_its_last_step(
    ends: Ends, lines: tuple[Line, Line]
) -> None:
    ours, theirs = lines
    Workers(data=RankGroup(rank=0), lines=[ours]).watch(StopFlag())
    theirs.close()
    assert ends.waits_for_commit.wait(60)
    assert not ends.codes
    ends.has_committed.set()
    assert ends.has_come.wait(60)
    assert ends.codes == [EXIT_RANK_LOST]
