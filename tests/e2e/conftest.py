"""The full local cluster as the quickstart leaves it, for every test of this folder."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "docs" / "quickstart.md"
_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
_KEY_FILE = ROOT / "me-key.txt"


def commands(page: Path, *, until: str) -> list[str]:
    """Return the console blocks of a page, up to the heading `until`."""
    text = page.read_text().split(f"\n## {until}\n")[0]
    return _BLOCK.findall(text)


def environment() -> dict[str, str]:
    """Return the environment in which kubectl reaches the local cluster."""
    printed = subprocess.run(
        ["make", "-s", "cluster-env"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    found = dict(os.environ)
    for line in printed.splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        found[name] = os.path.expandvars("".join(shlex.split(value)))
    return found


@dataclass(frozen=True)
class Cluster:
    """kubectl with the administrator's rights, and the gateway's own address."""

    env: dict[str, str]
    printed: str

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        done = subprocess.run(
            ["kubectl", *arguments],
            env=self.env, input=stdin, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def apply(self, *documents: dict[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": documents}
        self.kubectl("apply", "-f", "-", stdin=json.dumps(listed))

    def wait_for(self, *arguments: str, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the resource as soon as it is as wanted; the limit only ends a broken run."""
        deadline = time.monotonic() + 900
        while not until(found := self.get(*arguments)):
            assert time.monotonic() < deadline, json.dumps(found.get("status"), indent=1)
            time.sleep(0.5)
        return found

    @property
    def gateway(self) -> str:
        """The gateway's cluster address: this machine is the node, so it is reachable."""
        service = self.get("service", "mizzen-gateway", "-n", "mizzen-system")
        return f"http://{service['spec']['clusterIP']}:8080"

    @property
    def api_key(self) -> str:
        """The key that the quickstart made."""
        found = re.search(r"mz-\S+", _KEY_FILE.read_text())
        assert found is not None
        return found.group()


def kill_container(container: str) -> None:
    """Kill every process of a container; a container's id is part of its control group's name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            if container in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue  # ended meanwhile
    assert found, f"no process of container {container}"
    for pid in found:
        with contextlib.suppress(ProcessLookupError):  # the first one's end ends the others
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def quickstart() -> Iterator[Cluster]:
    """Run the quickstart's commands as written, on a namespace that does not exist yet."""
    fresh = [
        'eval "$(make -s cluster-env)"',
        "kubectl delete namespace quickstart --ignore-not-found --timeout=180s",
        "kubectl delete persistentvolume quickstart-models --ignore-not-found --timeout=60s",
    ]
    blocks = commands(QUICKSTART, until="Clean up")
    assert len(blocks) > 6
    first, *rest = blocks
    script = "\n".join(
        [
            "set -euo pipefail",
            "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT",
            first,
            *fresh,
            *rest,
        ]
    )
    done = subprocess.run(
        ["bash", "-x"], input=script, cwd=ROOT, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    yield Cluster(environment(), done.stdout)
