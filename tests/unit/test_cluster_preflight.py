"""What stands in the way of a local cluster is said in one clear sentence each."""

from dataclasses import replace
from pathlib import Path

import pytest

from hack.cluster.errors import ClusterError
from hack.cluster.preflight import GIB, INSTEAD, Facts, TakenPort, find_problems
from hack.images import build, store

GOOD = Facts(
    is_root=True,
    has_go=True,
    is_built=False,
    missing_packages=("containerd",),
    can_install=True,
    has_overlayfs=True,
    has_namespaces=True,
    missing_cgroups=(),
    taken_ports=(),
    free_bytes=40 * GIB,
    needed_gib=30,
    disk="/var",
)


def test_a_good_machine_has_no_problem() -> None:
    assert find_problems(GOOD) == []


def test_go_is_not_needed_once_the_servers_are_built() -> None:
    assert find_problems(replace(GOOD, has_go=False, is_built=True)) == []


CASES = {
    "without root": (
        replace(GOOD, is_root=False),
        "The cluster needs root to run containers: start it with sudo -E. " + INSTEAD,
    ),
    "without overlayfs": (
        replace(GOOD, has_overlayfs=False),
        "No overlay file system can be mounted here, so no container can run: use a machine "
        "whose kernel has overlayfs, outside of an unprivileged container. " + INSTEAD,
    ),
    "without namespaces": (
        replace(GOOD, has_namespaces=False),
        "No mount and network namespaces can be made here, so no container can run: use a "
        "machine or a container that allows them. " + INSTEAD,
    ),
    "without control groups": (
        replace(GOOD, missing_cgroups=("memory", "pids")),
        "The control groups memory, pids are not mounted under /sys/fs/cgroup, so no container "
        "can be limited: mount them. " + INSTEAD,
    ),
    "containerd can not be installed": (
        replace(GOOD, can_install=False),
        "These Debian packages are missing and there is no apt-get to install them: containerd. "
        "Install containerd and the others by hand. " + INSTEAD,
    ),
    "without Go": (
        replace(GOOD, has_go=False),
        "Go is missing: install Go 1.26 or newer and put `go` on the PATH, it builds the "
        "cluster's servers.",
    ),
    "a port taken by a known process": (
        replace(
            GOOD,
            taken_ports=(TakenPort(port=6443, purpose="the API server", process="k3s (pid 7)"),),
        ),
        "Port 6443, which the cluster needs for the API server, is taken by k3s (pid 7): "
        "stop that process, or change the port in hack/cluster/pins.toml.",
    ),
    "a port taken by an unknown process": (
        replace(GOOD, taken_ports=(TakenPort(port=53, purpose="DNS", process=""),)),
        "Port 53, which the cluster needs for DNS, is taken by another process: "
        "stop that process, or change the port in hack/cluster/pins.toml.",
    ),
    "a full disk": (
        replace(GOOD, free_bytes=3 * GIB),
        "The disk of /var has 3 GiB free and the cluster needs 30 GiB: free some, or point "
        "XDG_STATE_HOME and XDG_CACHE_HOME to a larger disk.",
    ),
}


@pytest.mark.parametrize(("facts", "sentence"), CASES.values(), ids=CASES)
def test_a_problem_is_one_sentence_that_says_what_to_change(facts: Facts, sentence: str) -> None:
    assert find_problems(facts) == [sentence]


def test_images_are_not_begun_on_a_disk_that_cannot_hold_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "succeeds", lambda *_: False)
    monkeypatch.setattr(build, "attempt", lambda *_: None)
    monkeypatch.setattr(store, "attempt", lambda *_: None)
    monkeypatch.setattr(build, "free_bytes", lambda _: 12 * GIB)
    with pytest.raises(ClusterError, match="has 12 GiB free and the images need 13 GiB: free"):
        build.build_packages(slim_torch=True)


def test_all_problems_are_said_at_once() -> None:
    facts = replace(GOOD, has_go=False, has_overlayfs=False, free_bytes=0)
    assert len(find_problems(facts)) == 3


def test_without_root_nothing_is_claimed_that_only_root_can_find_out() -> None:
    facts = replace(GOOD, is_root=False, has_overlayfs=False, has_namespaces=False)
    assert len(find_problems(facts)) == 1
