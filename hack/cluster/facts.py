"""Finding out what preflight judges. Changes nothing on the machine."""

import errno
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

from hack.cluster import gobuild
from hack.cluster.host import attempt, succeeds
from hack.cluster.pins import Pins
from hack.cluster.places import Layout, cache_root
from hack.cluster.preflight import Facts, TakenPort
from hack.cluster.processes import Processes

CGROUPS = ("cpu", "cpuset", "memory", "pids")
CGROUP_ROOT = Path("/sys/fs/cgroup")


def gather(layout: Layout, pins: Pins) -> Facts:
    """Look at the machine."""
    is_root = os.geteuid() == 0
    built = gobuild.is_built()
    state = _existing_parent(layout.root)
    return Facts(
        is_root=is_root,
        has_go=shutil.which("go") is not None,
        is_built=built,
        missing_packages=missing_packages(pins.debian_packages),
        can_install=shutil.which("apt-get") is not None,
        has_overlayfs=is_root and _can_mount_overlay(),
        has_namespaces=is_root
        and succeeds("unshare", "--mount", "--net", "--pid", "--fork", "true"),
        missing_cgroups=_missing_cgroups(),
        taken_ports=_taken_ports(layout, pins),
        free_bytes=free_bytes(layout.root),
        needed_gib=pins.servers_gib if built else pins.first_build_gib,
        disk=str(state),
    )


def free_bytes(state: Path) -> int:
    """Return the room of the fuller one of the two disks that the cluster writes to."""
    folders = (_existing_parent(state), _existing_parent(cache_root()))
    return min(shutil.disk_usage(folder).free for folder in folders)


def missing_packages(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Return the Debian packages that are not installed."""
    listing = attempt(["dpkg-query", "-W", "-f", "${Package} ${Status}\n", *wanted]).stdout
    installed = {line.split()[0] for line in listing.splitlines() if line.endswith(" installed")}
    return tuple(package for package in wanted if package not in installed)


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _can_mount_overlay() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        script = (
            f"cd {folder} && mkdir lower upper work merged && mount -t tmpfs none upper && "
            "mkdir upper/u upper/w && "
            "mount -t overlay overlay -o lowerdir=lower,upperdir=upper/u,workdir=upper/w merged"
        )
        # In a mount namespace of its own: whatever it mounts ends with it.
        return succeeds("unshare", "--mount", "sh", "-c", script)


def _missing_cgroups() -> tuple[str, ...]:
    unified = CGROUP_ROOT / "cgroup.controllers"
    if unified.exists():
        present = set(unified.read_text().split())
    else:
        folders = CGROUP_ROOT.iterdir() if CGROUP_ROOT.is_dir() else ()
        present = {name for folder in folders for name in folder.name.split(",")}
    return tuple(name for name in CGROUPS if name not in present)


def _taken_ports(layout: Layout, pins: Pins) -> tuple[TakenPort, ...]:
    processes = Processes(layout)
    ports = pins.ports
    node = pins.network.node_address
    needed = (
        ("kube-apiserver", "0.0.0.0", ports.api, "the API server"),
        ("etcd", "127.0.0.1", ports.etcd, "etcd"),
        ("etcd", "127.0.0.1", ports.etcd_peer, "etcd's peers"),
        ("kubelet", "0.0.0.0", ports.kubelet, "the kubelet"),
        ("registry", "127.0.0.1", ports.registry, "the local registry"),
        ("coredns", node, ports.dns, "DNS"),
    )
    return tuple(
        TakenPort(port=port, purpose=purpose, process=_listener(port))
        for server, address, port, purpose in needed
        if processes.running(server) is None and _is_taken(address, port)
    )


def _is_taken(address: str, port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections that linger from an earlier run are no reason to refuse.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _listener(port: int) -> str:
    listing = attempt(["ss", "-Hltnp", f"sport = :{port}"]).stdout
    found = re.search(r'users:\(\("([^"]+)",pid=(\d+)', listing)
    return f"{found.group(1)} (pid {found.group(2)})" if found else ""
