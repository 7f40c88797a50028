"""Debian's Prometheus, unpacked into the cache: for whoever asks a real server."""

import asyncio
import subprocess
import tempfile
from pathlib import Path

import aiohttp
import yaml

from hack.cluster.places import cache_root
from hack.ports import free_port

PACKAGE = "prometheus"


class NoPrometheusError(Exception):
    """The package cannot be had, or the server does not start; the text says why."""


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
    # Unpacked beside, then renamed: a run that is cut short leaves no half a server.
    with tempfile.TemporaryDirectory(dir=folder) as own:
        _run(["apt-get", "download", PACKAGE], Path(own))
        archives = sorted(Path(own).glob(f"{PACKAGE}_*.deb"))
        if not archives:
            raise NoPrometheusError(f"apt-get download {PACKAGE} brought no file.")
        _run(["dpkg", "-x", str(archives[-1]), "root"], Path(own))
        try:
            Path(own, "root").rename(folder / "root")
        except OSError:
            if not binary.exists():  # brought by another process meanwhile
                raise
    return binary


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoPrometheusError(f"{command[0]} is missing: not a Debian system.") from error
    except subprocess.CalledProcessError as error:
        raise NoPrometheusError(f"{' '.join(command)}: {error.stderr.strip()}") from error


class PrometheusServer:
    """A Prometheus server over a folder's data, ready inside."""

    def __init__(self, binary: Path, folder: Path, config: dict[str, object]) -> None:
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._address = f"127.0.0.1:{free_port()}"
        self._command = [
            str(binary),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self._address}",
        ]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        url = f"http://{self._address}"
        if not asyncio.run(_is_ready(url)):
            self.__exit__()
            raise NoPrometheusError(
                "Prometheus did not answer within 300 s. Run it to see why: "
                f"{' '.join(self._command)}"
            )
        return url

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=300)


async def _is_ready(url: str) -> bool:
    async with aiohttp.ClientSession() as session:
        for _ in range(3000):
            try:
                async with session.get(f"{url}/-/ready") as answer:
                    if answer.status == 200:
                        return True
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    return False
