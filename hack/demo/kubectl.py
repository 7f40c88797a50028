"""kubectl and helm as the demo uses them: the tools a user would use, with a user's permissions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hack.demo.console import Console, DemoError, run


class Kubectl:
    """Commands against one cluster, the local one or the current context's."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env

    @classmethod
    def of_current_context(cls) -> Kubectl:
        """Use the caller's own kubectl, context and helm.

        Raises:
            DemoError: a tool is missing or the cluster does not answer.
        """
        for tool in ("kubectl", "helm"):
            if shutil.which(tool) is None:
                raise DemoError(f"CLUSTER=current needs {tool} on the PATH; install it first.")
        kubectl = cls(dict(os.environ))
        try:
            kubectl("version", "--output=json", "--request-timeout=10s")
        except DemoError as error:
            raise DemoError(
                "The current kubectl context does not answer; check `kubectl cluster-info`, or "
                f"leave CLUSTER unset to use the local cluster.\n{error}"
            ) from error
        return kubectl

    def __call__(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl and return what it printed."""
        return run(["kubectl", *arguments], env=self.env, stdin=stdin)

    def helm(self, *arguments: str) -> str:
        """Run helm and return what it printed."""
        return run(["helm", *arguments], env=self.env)

    def get(self, *arguments: str) -> dict[str, object] | None:
        """Return a resource as a dict, None where it does not exist."""
        text = self("get", *arguments, "--ignore-not-found", "--output=json")
        return json.loads(text) if text.strip() else None

    def copy_in(self, source: Path, *, namespace: str, pod: str, target: str) -> None:
        """Stream a file into a running pod, as `kubectl cp` does, without needing tar there."""
        with source.open("rb") as stream:
            done = subprocess.run(
                ["kubectl", "exec", "-i", "-n", namespace, pod, "--",
                 "sh", "-c", f"cat > {target}.part && mv {target}.part {target}"],
                env=self.env, stdin=stream, capture_output=True, text=True, check=False,
            )  # fmt: skip
        if done.returncode != 0:
            raise DemoError(f"Copying {source.name} into pod {pod} failed: {done.stderr.strip()}")

    @contextmanager
    def port_forward(self, target: str, port: int, *, namespace: str) -> Iterator[str]:
        """Forward a free local port; the value is the base URL.

        Raises:
            DemoError: the forward did not open.
        """
        process = subprocess.Popen(
            ["kubectl", "port-forward", "-n", namespace, target, f":{port}"],
            env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "Forwarding from" not in line:
                raise DemoError(f"kubectl port-forward to {target} failed: {line.strip()}")
            yield "http://" + line.split("Forwarding from ")[1].split(" ->")[0]
        finally:
            process.terminate()
            process.wait(timeout=10)


def wait_until(
    console: Console,
    observe: Callable[[], tuple[bool, str]],
    *,
    timeout_s: float,
    failure: str,
) -> str:
    """Poll until the observation says done, showing its text; return the last text.

    Raises:
        DemoError: not done in time; the text holds the last observation.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        is_done, text = observe()
        if is_done:
            return text
        if time.monotonic() > deadline:
            raise DemoError(f"{failure} Last seen: {text}")
        console.note(text)
        time.sleep(1)


def condition(resource: dict[str, object] | None, kind: str) -> dict[str, str]:
    """Return one condition of a resource, empty where it has none yet."""
    status = (resource or {}).get("status")
    conditions = status.get("conditions", []) if isinstance(status, dict) else []
    return next((entry for entry in conditions if entry["type"] == kind), {})
