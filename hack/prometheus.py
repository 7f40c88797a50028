"""Debian's Prometheus, unpacked into the cache: for tests that ask a real server."""

import subprocess
from pathlib import Path

from hack.cluster.places import cache_root

PACKAGE = "prometheus"


class NoPrometheusError(Exception):
    """The package cannot be had; the text says why."""


def prometheus_binary() -> Path:
    """Return the server's path, fetched the first time (19 MB); promtool lies beside it.

    Raises:
        NoPrometheusError: there is no apt-get, or the archive does not answer.
    """
    folder = cache_root() / "prometheus"
    binary = folder / "root" / "usr" / "bin" / "prometheus"
    if binary.exists():
        return binary
    folder.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", PACKAGE], folder)
    archives = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if not archives:
        raise NoPrometheusError(f"apt-get download {PACKAGE} brought no file.")
    # Unpacked beside, then renamed: a run that is cut short leaves no half a server.
    partial = folder / "partial"
    _run(["dpkg", "-x", str(archives[-1]), str(partial)], folder)
    partial.rename(folder / "root")
    return binary


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoPrometheusError(f"{command[0]} is missing: not a Debian system.") from error
    except subprocess.CalledProcessError as error:
        raise NoPrometheusError(f"{' '.join(command)}: {error.stderr.strip()}") from error
