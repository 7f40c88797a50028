"""Running the host's commands, with their last words in the error when they fail."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from hack.cluster.errors import ClusterError


def run(*command: str | Path, stdin: str | None = None) -> str:
    """Run a command and return what it printed."""
    done = attempt(command, stdin=stdin)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip()
        raise ClusterError(f"`{' '.join(map(str, command))}` failed: {words}")
    return done.stdout


def succeeds(*command: str | Path) -> bool:
    """Say whether a command ends well."""
    return attempt(command).returncode == 0


def attempt(
    command: Sequence[str | Path], *, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command; one that is not installed counts as failed."""
    try:
        return subprocess.run(
            [*map(str, command)], input=stdin, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess([*map(str, command)], 127, "", "not installed")
