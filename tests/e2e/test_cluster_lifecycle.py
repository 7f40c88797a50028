"""The local cluster starts, survives the death of all its processes, and leaves nothing behind.

It runs in network, mount and control group namespaces of its own, so that it may look at everything
that is left there, and the cluster of the other tests beside it is not touched.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hack.images import store as image_store

ROOT = Path(__file__).parents[2]
GROUPS = Path("/sys/fs/cgroup")
pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.skipif(
        (GROUPS / "cgroup.controllers").exists(),
        reason="separates two clusters by the hierarchies of control groups version 1",
    ),
]

# In the new namespaces: a loopback device, and own copies of every folder that all kubelets share.
SETUP = """
set -e
ip link set lo up
for folder in /run /var/lib/kubelet /var/lib/cni /var/log/containers; do
    mkdir -p $folder && mount -t tmpfs tmpfs $folder
done
# `down --purge` deletes the built images, which the cluster beside needs.
mkdir -p "$MIZZEN_IMAGES" && mount -t tmpfs tmpfs "$MIZZEN_IMAGES"
names=$(awk '$3 == "cgroup" {print $2}' /proc/mounts | xargs -n 1 basename)
umount --recursive /sys/fs/cgroup
mount -t tmpfs tmpfs /sys/fs/cgroup
for name in $names; do
    mkdir /sys/fs/cgroup/$name
    option=$name
    if [ $name = systemd ]; then option=none,name=systemd; fi
    mount -t cgroup -o $option cgroup /sys/fs/cgroup/$name
done
echo ready
exec sleep infinity
"""
# What a pod needs at least: the pause image is there without any registry.
PODS = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "idle"},
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"app": "idle"}},
        "template": {
            "metadata": {"labels": {"app": "idle"}},
            "spec": {
                "containers": [
                    {"name": "idle", "image": "localhost/pause:1", "imagePullPolicy": "Never"}
                ]
            },
        },
    },
}


@dataclass(frozen=True)
class Sandbox:
    """A host of its own, as far as a cluster can tell."""

    pid: int
    state: Path

    def run(self, *command: str, stdin: str | None = None) -> str:
        entered = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--cgroup", "--wdns=/"]
        done = subprocess.run(
            [*entered, *command],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "XDG_STATE_HOME": str(self.state), "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def cluster(self, *arguments: str) -> str:
        return self.run("python3", "-m", "hack.cluster", *arguments)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        script = 'eval "$(python3 -m hack.cluster env)"; exec kubectl "$@"'
        return self.run("sh", "-c", script, "kubectl", *arguments, stdin=stdin)

    def restarts(self) -> list[int]:
        """How often each running container was started again."""
        pods = json.loads(self.kubectl("get", "pods", "-o", "json"))["items"]
        states = [status for pod in pods for status in pod["status"].get("containerStatuses", [])]
        return [status["restartCount"] for status in states if status["ready"]]

    def processes(self) -> list[int]:
        """Every process that lives in the sandbox's network, but for the one that holds it."""
        ours = os.readlink(f"/proc/{self.pid}/ns/net")
        return [pid for pid in _pids() if pid != self.pid and _network(pid) == ours]

    def lasting_processes(self) -> set[int]:
        """Those that are no helper's, which come and go."""
        found = set(self.processes())
        for _ in range(10):
            time.sleep(1)
            found &= set(self.processes())
        return found

    def kill(self) -> None:
        """Kill every process, as a crash of the host does."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):  # one's end may end another
                os.kill(pid, signal.SIGKILL)

    def traces(self) -> dict[str, str]:
        """All that a cluster could leave on a host."""
        mounts = Path(f"/proc/{self.pid}/mounts").read_text().splitlines()
        return {
            "packet filter": self.run("nft", "list", "ruleset"),
            "links": self.run("ip", "-brief", "link"),
            "addresses": self.run("ip", "-brief", "address"),
            "network namespaces": self.run("ip", "netns"),
            "control groups": self.run("find", "/sys/fs/cgroup", "-mindepth", "2", "-type", "d"),
            "mounts": "\n".join(line for line in mounts if str(self.state) in line),
            "files": self.run("find", "/run", "/var/lib/kubelet", "/var/lib/cni", "-type", "s,l"),
            "forwarding": self.run("cat", "/proc/sys/net/ipv4/ip_forward"),
            "panic": self.run("cat", "/proc/sys/kernel/panic", "/proc/sys/vm/overcommit_memory"),
        }


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    # Not pytest's folder: the path of a socket may have 107 bytes.
    state = Path(tempfile.mkdtemp(prefix="mz-"))
    groups = [_make_group(top) for top in GROUPS.iterdir() if (top / "tasks").exists()]
    join = "".join(f"echo $$ > {group}/cgroup.procs; " for group in groups)
    holder = subprocess.Popen(
        ["sh", "-c", f'{join} exec unshare --mount --net --cgroup sh -c "$0"', SETUP],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MIZZEN_IMAGES": str(image_store.root())},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    sandbox = Sandbox(pid=holder.pid, state=state)
    yield sandbox
    sandbox.kill()
    _wait_until(lambda: not sandbox.processes())
    holder.kill()
    holder.wait()
    shutil.rmtree(state, ignore_errors=True)
    for group in groups:
        for folder in [*sorted(group.rglob("*/"), reverse=True), group]:
            _wait_until(lambda folder=folder: _is_removed(folder))  # type: ignore[misc]


def _make_group(top: Path) -> Path:
    group = top / f"mizzen-e2e-{os.getpid()}"
    group.mkdir()
    for name in ("cpuset.cpus", "cpuset.mems"):
        if (top / name).exists():
            # A new group has no processor to run on.
            (group / name).write_text((top / name).read_text())
    return group


def test_a_cluster_comes_back_from_the_dead_and_leaves_nothing(sandbox: Sandbox) -> None:
    before = sandbox.traces()

    sandbox.cluster("up")
    sandbox.kubectl("apply", "-f", "-", stdin=json.dumps(PODS))
    _wait_until(lambda: sandbox.restarts() == [0, 0])
    sandbox.cluster("status")
    servers = sandbox.lasting_processes()
    sandbox.cluster("up")
    assert servers <= set(sandbox.processes()), "a second start must not touch what runs"

    sandbox.kill()
    sandbox.cluster("up")
    _wait_until(lambda: sandbox.restarts() == [1, 1])

    sandbox.cluster("down")
    _wait_until(lambda: not sandbox.processes())
    _wait_until_nothing_is_left(sandbox, before)

    sandbox.cluster("up")
    _wait_until(lambda: sandbox.restarts() == [2, 2])
    sandbox.cluster("down", "--purge")
    _wait_until_nothing_is_left(sandbox, before)
    assert not (sandbox.state / "mizzen" / "cluster").exists()


def test_a_second_cluster_is_refused_before_anything_is_changed(sandbox: Sandbox) -> None:
    listen = (
        "import socket, time; held = socket.create_server(('', 6443)); "
        "print(flush=True); time.sleep(600)"
    )
    entered = ["nsenter", f"--target={sandbox.pid}", "--net"]
    other = subprocess.Popen(
        [*entered, sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    other.stdout.readline()
    before = sandbox.traces()
    with pytest.raises(AssertionError, match="Port 6443, which the cluster needs for the API ser"):
        sandbox.cluster("up")
    assert sandbox.traces() == before
    assert not (sandbox.state / "mizzen").exists()
    other.kill()
    other.wait()


def _wait_until(is_so: Callable[[], bool], timeout_s: float = 400) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so in time"
        time.sleep(0.5)


def _wait_until_nothing_is_left(sandbox: Sandbox, before: dict[str, str]) -> None:
    """The kernel takes links and groups away some time after their last user."""
    deadline = time.monotonic() + 400
    while (left := sandbox.traces()) != before:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def _is_removed(group: Path) -> bool:
    """Remove a control group, which has to wait for the end of processes that were killed."""
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _network(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""  # ended, or a kernel thread
