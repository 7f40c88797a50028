"""How the pods of a group meet, whom they let in, and how they miss each other. No torch."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from hack.ports import free_port
from mizzen.runtime.errors import RankLostError
from mizzen.runtime.parallel import line as line_module
from mizzen.runtime.parallel.handshake import StrangerError, call_leader, check_caller, group_key
from mizzen.runtime.parallel.line import END, MESSAGE, Line, write_frame
from mizzen.runtime.parallel.nodes import (
    Nodes,
    NodesDisagreeError,
    SecretMissingError,
    meet_followers,
    reach_leader,
    read_secret,
)

HOST = "127.0.0.1"
ALIKE = "the settings' digest"


@pytest.fixture
def leader() -> Nodes:
    return Nodes(
        count=3, index=0, leader=HOST, port=free_port(), host=HOST, secret=b"ours", wait_s=60.0
    )


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def hello_of(index: int) -> bytes:
    return json.dumps({"node": index, "nodes": 3, "agreement": ALIKE}).encode()


def connect_to(leader: Nodes) -> socket.socket:
    """Return a connection to the leader's door, which may not be open yet."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((leader.leader, leader.port), timeout=60)
        time.sleep(0.01)


def close_all(meeting: "Future[list[Line]]", *calls: "Future[Line]") -> None:
    for line in [*meeting.result(), *(call.result() for call in calls)]:
        line.close()


def follow(threads: ThreadPoolExecutor, leader: Nodes, index: int) -> "Future[Line]":
    return threads.submit(reach_leader, replace(leader, index=index), ALIKE)


def test_pods_meet_in_any_order_and_speak_with_the_one_they_mean(
    leader: Nodes, threads: ThreadPoolExecutor
) -> None:
    second, first = follow(threads, leader, 2), follow(threads, leader, 1)  # the leader is late
    meeting = threads.submit(meet_followers, leader, ALIKE)
    for number, line in enumerate(meeting.result(), start=1):
        line.send(b"you are %d" % number)
    assert first.result().receive() == (MESSAGE, b"you are 1")
    assert second.result().receive() == (MESSAGE, b"you are 2")
    close_all(meeting, first, second)


def test_strangers_are_turned_away_and_the_group_still_forms(
    leader: Nodes, threads: ThreadPoolExecutor
) -> None:
    meeting = threads.submit(meet_followers, leader, ALIKE)
    silent = connect_to(leader)
    with connect_to(leader) as stranger, pytest.raises(StrangerError, match="admin token"):
        call_leader(stranger, group_key(b"theirs", "any"), hello_of(1))
    with connect_to(leader) as other_group, pytest.raises(StrangerError):
        call_leader(other_group, group_key(b"ours", "another group"), hello_of(1))
    with connect_to(leader) as flood:
        flood.recv(64)
        flood.sendall(b"\xff\xff\xff\xff")
        assert flood.recv(64) == b"", "whoever announces too much is cut off"
    first, second = follow(threads, leader, 1), follow(threads, leader, 2)
    close_all(meeting, first, second)
    silent.close()


def test_a_recorded_proof_opens_nothing(leader: Nodes) -> None:
    def prove(to: socket.socket) -> bytes:
        """Return what a true follower answers."""
        spoken: list[bytes] = []

        class Ear:
            def recv(self, size: int) -> bytes:
                return to.recv(size)

            def sendall(self, data: bytes) -> None:
                spoken.append(data)
                raise ConnectionAbortedError

        with pytest.raises(ConnectionAbortedError):
            call_leader(Ear(), leader.key, hello_of(1))
        return spoken[0]

    def challenge() -> tuple[socket.socket, threading.Thread, list[BaseException]]:
        ours, theirs = socket.socketpair()
        found: list[BaseException] = []

        def check() -> None:
            try:
                check_caller(ours, leader.key)
            except StrangerError as error:
                found.append(error)

        thread = threading.Thread(target=check)
        thread.start()
        return theirs, thread, found

    first, first_check, found = challenge()
    recorded = prove(first)
    first.sendall(recorded)
    first_check.join()
    assert found == [], "it was good once"
    second, second_check, found = challenge()
    second.sendall(recorded)
    second_check.join()
    assert "does not hold the group's secret" in str(found[0])


def test_a_false_leader_gets_nobody(leader: Nodes, threads: ThreadPoolExecutor) -> None:
    with socket.create_server((HOST, leader.port)) as door:
        call = threads.submit(reach_leader, replace(leader, index=1, wait_s=0), ALIKE)
        connection, _ = door.accept()
        with connection:
            write_frame(connection, b"n" * 32)
            connection.recv(1024)
            write_frame(connection, b"p" * 32)
            with pytest.raises(RankLostError, match="does not hold the group's secret"):
                call.result()


def test_a_pod_with_other_settings_is_told_so(leader: Nodes, threads: ThreadPoolExecutor) -> None:
    meeting = threads.submit(meet_followers, leader, ALIKE)
    with pytest.raises(NodesDisagreeError, match="same flags"):
        reach_leader(replace(leader, index=1), "other settings")
    with pytest.raises(NodesDisagreeError, match="same --nnodes"):
        reach_leader(replace(leader, index=1, count=2), ALIKE)
    close_all(meeting, follow(threads, leader, 1), follow(threads, leader, 2))


def test_a_pod_that_was_restarted_takes_its_own_place_again(
    leader: Nodes, threads: ThreadPoolExecutor
) -> None:
    meeting = threads.submit(meet_followers, leader, ALIKE)
    reach_leader(replace(leader, index=1), ALIKE).close()
    first = follow(threads, leader, 1)
    first.result()
    second = follow(threads, leader, 2)
    meeting.result()[0].send(b"again")
    assert first.result().receive() == (MESSAGE, b"again")
    close_all(meeting, first, second)


def test_a_leader_whose_pods_do_not_come_says_which_and_what_to_look_at(
    leader: Nodes, threads: ThreadPoolExecutor
) -> None:
    first = follow(threads, leader, 1)
    with pytest.raises(RankLostError) as caught:
        meet_followers(replace(leader, wait_s=6.0), ALIKE)
    first.result().close()
    for word in ("pod 2 did not come", "kubectl logs", str(leader.port), "admin token"):
        assert word in str(caught.value)


def test_a_leader_that_does_not_come_is_given_up(leader: Nodes) -> None:
    with pytest.raises(RankLostError, match="did not reach its leader"):
        reach_leader(replace(leader, index=1, wait_s=0.2), ALIKE)


@pytest.mark.parametrize("content", [None, b" \n"], ids=["that is not there", "that is empty"])
def test_a_secret_is_named(tmp_path, content: bytes | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SecretMissingError, match="--admin-token-file"):
        read_secret(path)


def test_silence_ends_a_line_that_is_still_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_module, "SILENCE_S", 0.6)
    with (
        socket.create_server((HOST, 0)) as door,
        socket.create_connection(door.getsockname()),
    ):
        line = Line(door.accept()[0], "Pod 7")
        line.expect_life()
        with pytest.raises(RankLostError, match=r"Pod 7 gave no sign of life for 0\.6 s"):
            line.receive()


def test_an_end_that_is_meant_is_no_loss() -> None:
    with socket.create_server((HOST, 0)) as door:
        ours = Line(socket.create_connection(door.getsockname()), "Pod 1")
        theirs = Line(door.accept()[0], "Pod 0")
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(ours.end)
        assert theirs.receive() == (END, b"")
        theirs.close()
        ending.result()


def test_a_line_that_is_cut_is_a_loss() -> None:
    with socket.create_server((HOST, 0)) as door:
        ours = Line(socket.create_connection(door.getsockname()), "Pod 1")
        theirs = Line(door.accept()[0], "Pod 0")
    ours.close()
    with pytest.raises(RankLostError, match="Pod 0 closed its connection"):
        theirs.receive()
    theirs.close()
