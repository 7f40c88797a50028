"""Servers are known again by pid and start time, and restarted only when something changed."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hack.cluster.errors import ClusterError
from hack.cluster.places import Layout
from hack.cluster.processes import Processes, Server

SLEEP = ("sleep", "600")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """An empty cluster."""
    layout = Layout(tmp_path)
    layout.create()
    return layout


@pytest.fixture
def processes(layout: Layout) -> Iterator[Processes]:
    """The processes of one test, ended after it."""
    processes = Processes(layout, die_with_parent=True)
    yield processes
    for name in processes.names():
        processes.stop(name, sign=signal.SIGKILL)


def test_a_running_server_is_left_alone(processes: Processes) -> None:
    assert processes.start(Server(name="a", argv=SLEEP))
    pid = processes.running("a")
    assert pid is not None
    assert not processes.start(Server(name="a", argv=SLEEP))
    assert processes.running("a") == pid


def test_a_server_with_other_flags_is_started_again(processes: Processes) -> None:
    processes.start(Server(name="a", argv=SLEEP))
    pid = processes.running("a")
    assert processes.start(Server(name="a", argv=("sleep", "601")))
    assert processes.running("a") not in (None, pid)


def test_a_server_whose_file_changed_is_started_again(processes: Processes, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("old")
    server = Server(name="a", argv=SLEEP, reads=(config,))
    processes.start(server)
    config.write_text("new")
    assert processes.start(server)


def test_a_killed_server_does_not_count_as_running(processes: Processes) -> None:
    processes.start(Server(name="a", argv=SLEEP))
    pid = processes.running("a")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert processes.running("a") is None
    assert processes.start(Server(name="a", argv=SLEEP))


def test_a_pid_that_another_process_got_is_not_ours(processes: Processes, layout: Layout) -> None:
    (layout.run / "a.process").write_text(json.dumps([os.getpid(), 1, ""]))
    assert processes.running("a") is None
    processes.stop("a")  # and it is not ended either


def test_a_record_cut_short_names_no_process(processes: Processes, layout: Layout) -> None:
    (layout.run / "a.process").write_text("[12")
    assert processes.running("a") is None


def test_a_server_that_ignores_a_polite_end_is_killed(processes: Processes) -> None:
    stubborn = "trap '' TERM; while :; do sleep 0.1; done"
    processes.start(Server(name="a", argv=("sh", "-c", stubborn)))
    processes.stop("a", grace_s=0.3)
    assert processes.running("a") is None
    assert processes.names() == []


def test_a_server_that_ends_at_its_start_is_reported_with_its_words(processes: Processes) -> None:
    processes.start(Server(name="a", argv=("sh", "-c", "echo the port is taken >&2; exit 1")))
    with pytest.raises(ClusterError, match=r"a ended at its start:\nthe port is taken"):
        processes.wait_for("a", lambda: False, timeout_s=30)


def test_a_server_that_never_answers_is_reported(processes: Processes) -> None:
    processes.start(Server(name="a", argv=SLEEP))
    with pytest.raises(ClusterError, match="a was not ready after 0 s"):
        processes.wait_for("a", lambda: False, timeout_s=0.1)


def test_only_a_server_that_pulls_sees_the_proxy(
    processes: Processes, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    show = ("sh", "-c", "echo proxy=$HTTPS_PROXY; exec sleep 600")
    for name, keeps in (("kubelet", False), ("containerd", True)):
        processes.start(Server(name=name, argv=show, keeps_proxy=keeps))
        log = processes.log(name)
        processes.wait_for(name, lambda log=log: log.read_text() != "", timeout_s=30)  # type: ignore[misc]
    assert processes.log("kubelet").read_text() == "proxy=\n"
    assert processes.log("containerd").read_text() == "proxy=http://proxy:3128\n"
