"""What the demo shows: numbered steps with elapsed time, one live line for whatever takes long."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class DemoError(Exception):
    """Ends the demo; the text says what to change or where to look."""


class Console:
    """Prints steps; on a terminal the current line is rewritten, elsewhere only changes appear."""

    def __init__(self, *, started_at: float | None = None) -> None:
        self._started_at = time.monotonic() if started_at is None else started_at
        self._is_terminal = sys.stdout.isatty()
        self._seconds: list[tuple[str, float]] = []
        self._last_note = ""

    def elapsed_s(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._started_at

    def say(self, text: str) -> None:
        """Print one line under the current step."""
        self._clear()
        print(f"        {text}", flush=True)

    def note(self, text: str) -> None:
        """Show what is going on right now; the next note takes its place."""
        if self._is_terminal:
            self._clear()
            print(f"\r        {text[:100]}", end="", flush=True)
        elif text != self._last_note:
            print(f"        {text}", flush=True)
        self._last_note = text

    def _clear(self) -> None:
        if self._is_terminal:
            print("\r\033[2K", end="")

    def step(self, title: str, action: Callable[[], str | None]) -> None:
        """Run one step and print how long it took; its answer is the line that sums it up."""
        print(f"[{self._clock()}] {title}", flush=True)
        began = time.monotonic()
        summary = action()
        seconds = time.monotonic() - began
        self._seconds.append((title, seconds))
        self._clear()
        print(f"        done in {seconds:.1f} s{': ' + summary if summary else ''}", flush=True)

    def table(self) -> None:
        """Print the seconds of every step."""
        print(f"\n{'step':<58}{'seconds':>9}")
        for title, seconds in self._seconds:
            print(f"{title:<58}{seconds:>9.1f}")
        print(f"{'all':<58}{self.elapsed_s():>9.1f}", flush=True)

    def _clock(self) -> str:
        minutes, seconds = divmod(int(self.elapsed_s()), 60)
        return f"{minutes:02d}:{seconds:02d}"


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command to its end and return what it printed.

    Raises:
        DemoError: it failed; the text holds the last lines it printed.
    """
    done = subprocess.run(
        [str(part) for part in command],
        env=env, input=stdin, cwd=cwd, text=True, capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise DemoError(f"`{' '.join(str(part) for part in command)}` failed:\n{tail}")
    return done.stdout


class Background:
    """A command that runs beside others; its last lines are kept for the progress display."""

    def __init__(
        self, title: str, command: Sequence[str], *, env: Mapping[str, str] | None = None
    ) -> None:
        self.title = title
        self._tail: deque[str] = deque(maxlen=12)
        self._process = subprocess.Popen(
            command, env=env, text=True, bufsize=1,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip():
                self._tail.append(line.rstrip().split("\r")[-1])

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def last_line(self) -> str:
        """Return the newest line it printed."""
        return self._tail[-1].strip() if self._tail else "starting"

    def check(self) -> None:
        """Raise DemoError when it failed."""
        self._reader.join(timeout=2)
        if self._process.returncode:
            raise DemoError(f"{self.title} failed:\n" + "\n".join(self._tail))

    def stop(self) -> None:
        """End it, for when another one failed or the user interrupts."""
        if self.is_running():
            self._process.terminate()
            self._process.wait(timeout=20)


def wait_for_all(console: Console, tasks: Sequence[Background]) -> None:
    """Show the progress of tasks that run side by side until all have ended well.

    Raises:
        DemoError: one failed; the others are stopped.
    """
    try:
        while running := [task for task in tasks if task.is_running()]:
            console.note(" | ".join(f"{task.title}: {task.last_line()}" for task in running))
            for task in tasks:
                if not task.is_running():
                    task.check()
            time.sleep(1)
        for task in tasks:
            task.check()
    finally:
        for task in tasks:
            task.stop()
