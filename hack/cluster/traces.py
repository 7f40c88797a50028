"""What containers leave behind when their keepers die: processes, mounts, control groups, sockets.

Told apart from another container runtime's by what only ours has: our state folder and the
kubelet's control group (a second kubelet on the machine is refused by preflight).
"""

import os
import shutil
import signal
import socket
import time
from pathlib import Path

from hack.cluster import containerd
from hack.cluster.facts import CGROUP_ROOT
from hack.cluster.host import attempt
from hack.cluster.places import Layout

PODS = "kubepods"
KUBELET_FOLDER = Path("/var/lib/kubelet")
CONTAINER_LOGS = Path("/var/log/containers")
CNI_RESULTS = Path("/var/lib/cni/results")
SHIM_SOCKETS = Path("/run/containerd/s")
WAIT_S = 10.0


def kill_containers(layout: Layout) -> None:
    """Kill every container; their shims end by themselves where containerd still runs."""
    deadline = time.monotonic() + WAIT_S
    while (pids := _pods_pids()) and time.monotonic() < deadline:
        _kill(pids)
        time.sleep(0.05)
    while _shims(layout) and time.monotonic() < deadline:
        time.sleep(0.05)


def remove(layout: Layout) -> None:
    """Remove all traces; call it only when kubelet and containerd are stopped."""
    _kill(_shims(layout))
    _kill(_pods_pids())
    _unmount_below(layout.root)
    _remove_control_groups()
    _remove_dead_sockets()
    # The node's addresses are given out again from the start, as after a reboot.
    shutil.rmtree(layout.run / "addresses", ignore_errors=True)
    shutil.rmtree(layout.run / "containerd", ignore_errors=True)
    _remove_links(layout)
    for name in ("kubelet.sock", "kubelet_internal_checkpoint"):
        (KUBELET_FOLDER / "device-plugins" / name).unlink(missing_ok=True)
    for folder in (KUBELET_FOLDER / "device-plugins", KUBELET_FOLDER, CONTAINER_LOGS):
        _remove_if_empty(folder)


def mounts_below(folder: Path) -> list[str]:
    """Return the mount points below a folder, the deepest first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    return sorted((point for point in points if point.startswith(f"{folder}/")), reverse=True)


def control_groups() -> list[Path]:
    """Return the control groups of pods, the deepest first."""
    tops = [CGROUP_ROOT / PODS, *CGROUP_ROOT.glob(f"*/{PODS}")]
    # os.walk does not mind a group that goes while it looks. On version 1, `cpu` and `cpuacct` may
    # be links to one folder.
    found = {Path(folder).resolve() for top in tops for folder, _, _ in os.walk(top)}
    return sorted(found, key=lambda path: len(path.parts), reverse=True)


def _pods_pids() -> list[int]:
    pids: set[int] = set()
    for group in control_groups():
        try:
            pids.update(map(int, (group / "cgroup.procs").read_text().split()))
        except OSError:
            continue  # removed while we looked
    return sorted(pids)


def _shims(layout: Layout) -> list[int]:
    ours = str(containerd.socket_path(layout)).encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"containerd-shim" in words[0] and ours in words:
            pids.append(int(folder.name))
    return pids


def _kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _unmount_below(folder: Path) -> None:
    for point in mounts_below(folder):
        if attempt(["umount", point]).returncode != 0:
            # Something still holds it; detached, it goes when that does.
            attempt(["umount", "--lazy", point])


def _remove_control_groups() -> None:
    deadline = time.monotonic() + WAIT_S
    while (groups := control_groups()) and time.monotonic() < deadline:
        for group in groups:
            try:
                group.rmdir()
            except OSError:
                continue  # a killed process takes a moment to leave it
        time.sleep(0.05)


def _remove_dead_sockets() -> None:
    """Remove shims' sockets that nobody listens on; another containerd's answer and stay."""
    for path in SHIM_SOCKETS.glob("*") if SHIM_SOCKETS.is_dir() else ():
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue


def _remove_links(layout: Layout) -> None:
    for link in CONTAINER_LOGS.glob("*") if CONTAINER_LOGS.is_dir() else ():
        if link.is_symlink() and str(link.readlink()).startswith(str(layout.root)):
            link.unlink()
    for result in CNI_RESULTS.glob(f"{containerd.CNI_NETWORK}-*") if CNI_RESULTS.is_dir() else ():
        result.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()) and not folder.is_mount():
        folder.rmdir()
