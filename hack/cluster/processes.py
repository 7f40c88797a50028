"""Starting and stopping servers as processes that outlive us, known again by pid and start time."""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hack.cluster.errors import ClusterError
from hack.cluster.places import Layout

POLL_S = 0.05
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One long-running process and the files it reads at its start."""

    name: str
    argv: tuple[str, ...]
    reads: tuple[Path, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    # Pulling images is the one thing that may have to go through the user's proxy.
    keeps_proxy: bool = False

    def fingerprint(self) -> str:
        """Return a hash that changes when a running process is no longer the wanted one."""
        digest = hashlib.sha256(json.dumps([self.argv, sorted(self.env.items())]).encode())
        for path in self.reads:
            digest.update(path.read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Record:
    """What we remember of a process that we started."""

    pid: int
    # Clock ticks since boot. With the pid it names one process for ever; a pid is used again.
    started: int
    fingerprint: str


class Processes:
    """The servers of one cluster."""

    def __init__(self, layout: Layout, *, die_with_parent: bool = False) -> None:
        """Die with the parent in tests: a killed test run then leaves no server behind."""
        self._layout = layout
        self._die_with_parent = die_with_parent

    def names(self) -> list[str]:
        """Return the servers that were ever started and not stopped."""
        return sorted(path.stem for path in self._layout.run.glob("*.process"))

    def running(self, name: str) -> int | None:
        """Return the pid when the server runs."""
        record = self._record(name)
        alive = record is not None and start_ticks(record.pid) == record.started
        return record.pid if record is not None and alive else None

    def start(self, server: Server) -> bool:
        """Start the server unless it runs as wanted; say whether it was started."""
        record = self._record(server.name)
        if self.running(server.name) is not None:
            if record is not None and record.fingerprint == server.fingerprint():
                return False
            self.stop(server.name)
        with self.log(server.name).open("ab") as log:
            process = subprocess.Popen(
                server.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(server),
                start_new_session=True,
                # containerd under umask 077 makes image layers that no other user can enter.
                umask=0o022,
                preexec_fn=_die_with_parent if self._die_with_parent else None,
            )
        _children.append(process)
        document = [process.pid, start_ticks(process.pid) or 0, server.fingerprint()]
        self._record_path(server.name).write_text(json.dumps(document))
        return True

    def stop(
        self, name: str, *, sign: signal.Signals = signal.SIGTERM, grace_s: float = 10
    ) -> None:
        """End the server and wait until it is gone; after `grace_s` it is killed."""
        pid = self.running(name)
        if pid is not None:
            _signal(pid, sign)
            if not _gone(lambda: self.running(name) is None, grace_s):
                _signal(pid, signal.SIGKILL)
                if not _gone(lambda: self.running(name) is None, 60):
                    raise ClusterError(f"{name} (pid {pid}) does not end even when killed.")
        self._record_path(name).unlink(missing_ok=True)

    def wait_for(self, name: str, is_ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Wait until the server answers; one that ended instead is reported with its last words."""
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if self.running(name) is None:
                raise ClusterError(f"{name} ended at its start:\n{self.last_words(name)}")
            if time.monotonic() > deadline:
                words = self.last_words(name)
                raise ClusterError(f"{name} was not ready after {timeout_s:.0f} s:\n{words}")
            time.sleep(POLL_S)

    def log(self, name: str) -> Path:
        """Return the server's log file."""
        return self._layout.logs / f"{name}.log"

    def last_words(self, name: str, lines: int = 15) -> str:
        """Return the end of the server's log, and where the rest is."""
        log = self.log(name)
        text = log.read_text(errors="replace") if log.exists() else ""
        return "\n".join([*text.splitlines()[-lines:], f"(all of it: {log})"])

    def _record(self, name: str) -> Record | None:
        try:
            return Record(*json.loads(self._record_path(name).read_text()))
        except (FileNotFoundError, ValueError):
            return None  # a record cut short by a crash names no process

    def _record_path(self, name: str) -> Path:
        return self._layout.run / f"{name}.process"


# Kept so that a server which ends while we run is reaped instead of staying a zombie.
_children: list[subprocess.Popen[bytes]] = []


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in ticks since boot; None when it is gone or only a zombie."""
    for child in _children:
        child.poll()
    try:
        # The name in brackets may hold spaces and brackets; what follows the last one is regular.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _environment(server: Server) -> dict[str, str]:
    kept = dict(os.environ)
    if not server.keeps_proxy:
        kept = {name: value for name, value in kept.items() if name.lower() not in PROXIES}
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {**kept, "PATH": path, **server.env}


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _signal(pid: int, sign: signal.Signals) -> None:
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        return  # ended by itself in between


def _gone(is_gone: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_gone():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
