"""The operator as a process beside a benchmark: start, stop, memory, metrics."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil
import yaml

from hack.cluster.api_only import ApiCluster
from hack.ports import free_ports

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = "mizzen-system"
ACCOUNT = "mizzen-operator"
LIMIT_S = 600.0


def service_account(cluster: ApiCluster) -> Path:
    """Return a kubeconfig that logs in as a pod does: by a service account's token."""
    cluster.kubectl("create", "serviceaccount", ACCOUNT, "-n", SYSTEM)
    cluster.kubectl(
        "create", "clusterrolebinding", ACCOUNT, "--clusterrole=cluster-admin",
        f"--serviceaccount={SYSTEM}:{ACCOUNT}",
    )  # fmt: skip
    token = cluster.kubectl("create", "token", ACCOUNT, "-n", SYSTEM, "--duration=2h").strip()
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    path = cluster.directory / f"{ACCOUNT}.kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


class Operator:
    """The operator as a process of this machine."""

    def __init__(self, cluster: ApiCluster, log: Path, **settings: str) -> None:
        """Take where it works, where its log goes and its settings beside the defaults."""
        self.port = free_ports(1)[0]
        self.log = log
        self.environment = {
            **os.environ,
            "KUBECONFIG": str(service_account(cluster)),
            "MIZZEN_NAMESPACE": SYSTEM,
            "MIZZEN_HEALTH_HOST": "127.0.0.1",
            "MIZZEN_HEALTH_PORT": str(self.port),
            # As in an image, where everything is compiled beforehand.
            "PYTHONPYCACHEPREFIX": str(cluster.directory / "pycache"),
            **settings,
        }
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "mizzen.cli", "operator",
                cwd=ROOT, env=self.environment, stdout=output, stderr=output,
            )  # fmt: skip

    async def stop(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()

    def memory_mib(self) -> float:
        assert self.process is not None
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20

    async def metrics(self) -> dict[str, float]:
        """Return its metrics, {} while it does not answer."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        try:
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                lines = (await answer.text()).splitlines()
        except aiohttp.ClientError:
            return {}
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    async def writes(self) -> float:
        """Return the writes it made, as it counts them itself; Events are not among them."""
        return sum(
            value
            for name, value in (await self.metrics()).items()
            if name.startswith("mizzen_writes_total") and "skipped" not in name
        )

    async def wait_for(self, is_so: Callable[[dict[str, float]], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not is_so(await self.metrics()):  # noqa: ASYNC110  # another process
                await asyncio.sleep(0.05)
