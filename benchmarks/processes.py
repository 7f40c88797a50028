"""A started program with all its children: paused, resumed, measured and ended as one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
_STOP_S = 30.0


class ProcessTree:
    """One program of a comparison. What it writes to its log file is kept for error messages."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        cores: int,
        environment: Mapping[str, str | None],
        stdin: int | None = None,
        stdout: int | None = None,
    ) -> None:
        """Start it on the first `cores` of those that this process may use."""
        self.log = log
        self.started_at = time.perf_counter()
        wanted = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=sink if stdout is None else stdout,
                stderr=sink,
                cwd=REPOSITORY,
                env={name: value for name, value in wanted.items() if value is not None},
                text=stdin is not None,
                preexec_fn=partial(os.sched_setaffinity, 0, first_cores(cores)),
            )
        self._root = psutil.Process(self._process.pid)

    @property
    def stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def is_running(self) -> bool:
        """Whether the program itself has not ended."""
        return self._process.poll() is None

    def pause(self) -> None:
        """Keep every process from computing: some engines spin while they wait for work."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """Return the processor seconds used so far by those that still run."""
        return sum(sum(process.cpu_times()[:2]) for process in self._living())

    def pss_bytes(self) -> int:
        """Return the memory in use; a page that several processes share counts once."""
        return sum(process.memory_full_info().pss for process in self._living())

    def anonymous_bytes(self) -> int:
        """Return what no file backs, which a cgroup's limit cannot take back under pressure."""
        return sum(_anonymous_bytes(process.pid) for process in self._living())

    def stop(self) -> None:
        """End them: politely first, and what is left after half a minute by force."""
        everyone = list(self._living())
        self.resume()
        if self._process.stdin is not None:
            self._process.stdin.close()  # a worker ends with its input, and takes its own along
        elif self.is_running():
            self._process.terminate()
        _, left = psutil.wait_procs(everyone, timeout=_STOP_S)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def last_words(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-3000:]

    def _signal(self, number: signal.Signals) -> None:
        for process in self._living():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _living(self) -> Iterator[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            yield from (self._root, *self._root.children(recursive=True))


def _anonymous_bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    (kib,) = (line.split()[1] for line in rollup.splitlines() if line.startswith("Anonymous:"))
    return 1024 * int(kib)


def first_cores(count: int) -> list[int]:
    """Return the first cores that this process may use."""
    return sorted(os.sched_getaffinity(0))[:count]
