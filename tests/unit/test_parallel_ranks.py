"""A group of ranks: sums, and what happens when one of them is gone."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch

from mizzen.runtime.errors import RankLostError
from mizzen.runtime.parallel.ranks import Ranks
from tests.fixtures import rank_work


@contextmanager
def started(size: int, follow: Any, *arguments: Any, **options: Any) -> Iterator[Ranks]:
    ranks = Ranks(size, follow, arguments, **options)
    try:
        yield ranks
    finally:
        ranks.stop()


def test_one_rank_starts_nothing_and_changes_nothing() -> None:
    with started(1, rank_work.echo_sum) as ranks:
        x = torch.ones(3)
        assert ranks.group.all_reduce(x) is x
        assert ranks.group.all_gather(x) is x
        ranks.send(b"nobody hears this")
        ranks.check()


def test_three_ranks_sum_and_gather_on_each_message() -> None:
    with started(3, rank_work.echo_sum) as ranks:
        for number in (2, 5):
            ranks.send(b"%d" % number)
            assert ranks.group.all_reduce(torch.tensor([100.0])).item() == 100 + 3 * number
            assert ranks.group.all_gather(torch.tensor([[0.0]])).tolist() == [[0.0, 1.0, 2.0]]


def listeners() -> set[tuple[int, str, int]]:
    """Return by process where this one and those it started listen: (pid, address, port)."""
    found = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # an earlier test's, at its end
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((process.pid, connection.laddr.ip, connection.laddr.port))
    return found


def test_two_groups_in_one_pod_do_not_meet_and_listen_on_loopback_only() -> None:
    before = listeners()
    with (
        started(2, rank_work.echo_sum) as ours,
        started(2, rank_work.echo_sum) as theirs,
    ):
        for ranks, number in ((ours, 2), (theirs, 5)):
            ranks.send(b"%d" % number)
            assert ranks.group.all_reduce(torch.tensor([100.0])).item() == 100 + number
            ranks.group.all_gather(torch.tensor([[0.0]]))
        heard = {address for _pid, address, _port in listeners() - before}
        assert heard == {"127.0.0.1"}


def test_a_dead_rank_breaks_the_collective_and_takes_the_group_down() -> None:
    lost = threading.Event()
    with started(3, rank_work.die_on_message) as ranks:
        ranks.serve(lambda _: lost.set())
        ranks.send(b"die")
        with pytest.raises(RankLostError):
            ranks.group.all_reduce(torch.ones(1))
        assert lost.wait(300)
        with pytest.raises(RankLostError, match="ended with exit code"):
            ranks.check()
        with pytest.raises(RankLostError):
            ranks.send(b"more")
        # Told first, ended next: nobody may be sent here while they are.
        deadline = time.monotonic() + 300
        while any(map(psutil.pid_exists, ranks.pids)):
            assert time.monotonic() < deadline, "the others live on"
            time.sleep(0.05)


@pytest.mark.parametrize("stages", [1, 2], ids=["one stage", "two stages"])
def test_a_silent_rank_is_a_lost_rank_once_all_have_read_their_weights(stages: int) -> None:
    times = {"timeout_s": 15.0, "start_timeout_s": 300.0}
    with started(2 * stages, rank_work.fall_silent, 20.0, stages=stages, **times) as ranks:
        assert ranks.group.all_reduce(torch.ones(1)).item() == 2
        ranks.serve(lambda _: None)
        with pytest.raises(RankLostError, match="in a collective"):
            ranks.group.all_reduce(torch.ones(1))


def test_ranks_end_when_rank_0_is_killed() -> None:
    program = (
        "from mizzen.runtime.parallel.ranks import Ranks\n"
        "from tests.fixtures import rank_work\n"
        "if __name__ == '__main__':\n"
        "    ranks = Ranks(3, rank_work.echo_sum)\n"
        "    print(*ranks.pids, flush=True)\n"
        "    input()\n"
    )
    command = [sys.executable, "-c", program]
    leader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert leader.stdout is not None
    followers = [psutil.Process(int(pid)) for pid in leader.stdout.readline().split()]
    assert len(followers) == 2
    leader.kill()
    leader.communicate()
    assert not psutil.wait_procs(followers, timeout=300)[1]


def test_a_rank_that_cannot_start_ends_the_start() -> None:
    with pytest.raises(RankLostError, match="Rank 1 did not start"):
        Ranks(2, rank_work.refuse_to_start, (rank_work.BreaksWhenReceived(),))
