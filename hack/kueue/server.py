"""Kueue's controller as a process of this machine, admitting for one API server.

It is installed as its chart says but for what needs a kubelet: its webhooks are reached through a
Service that is only a name for this machine, and the certificate that it makes for them is
written down by us instead of mounted.
"""

import base64
import json
import shutil
import signal
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from hack.cluster.api_only import ApiCluster
from hack.cluster.places import Layout
from hack.cluster.processes import Processes, Server
from hack.kueue.build import NAMESPACE, build
from hack.ports import free_ports

KINDS = (
    "CustomResourceDefinition",
    "MutatingWebhookConfiguration",
    "Secret",
    "ValidatingWebhookConfiguration",
)
SERVICE = "kueue-webhook-service"
CERTIFICATE = "kueue-webhook-server-cert"
CONFIG = "controller_manager_config.yaml"
TIMEOUT_S = 300.0

Document = dict[str, Any]


class Kueue:
    """Kueue with its chart's configuration; as a context manager it admits inside."""

    def __init__(self, cluster: ApiCluster) -> None:
        """Take the cluster, which has no Kueue yet."""
        self._cluster = cluster
        self._layout = Layout(Path(tempfile.mkdtemp(prefix="mizzen-kueue-")))
        self._processes = Processes(self._layout, die_with_parent=True)
        self._webhook_port, self._health_port = free_ports(2)

    def __enter__(self) -> Self:
        """Install the kinds, start the controller and wait until it admits."""
        built = build()
        self._layout.create()
        chart = yaml.safe_load_all((built / "chart.yaml").read_text())
        self._install([document for document in chart if document])
        argv = (
            str(built / "kueue"),
            f"--config={self._layout.etc / CONFIG}",
            f"--kubeconfig={self._cluster.kubeconfig}",
            "--feature-gates=VisibilityOnDemand=false",
        )
        self._processes.start(Server(name="kueue", argv=argv, env={"POD_NAMESPACE": NAMESPACE}))
        try:
            self._wait_for(self._has_certificate)
            self._wait_for(self._is_ready)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the controller; what was installed goes with the cluster."""
        self._processes.stop("kueue", sign=signal.SIGKILL)
        shutil.rmtree(self._layout.root)

    def _install(self, chart: list[Document]) -> None:
        self._cluster.create_namespace(NAMESPACE)
        wanted = [document for document in chart if document["kind"] in KINDS]
        for client in (client for document in wanted for client in _webhook_clients(document)):
            client["service"]["port"] = self._webhook_port
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": SERVICE, "namespace": NAMESPACE},
            "spec": {"type": "ExternalName", "externalName": "localhost"},
        }
        items = {"apiVersion": "v1", "kind": "List", "items": [service, *wanted]}
        self._cluster.kubectl("create", "-f", "-", stdin=json.dumps(items))
        wait = ("wait", "--for=condition=Established", "crd", "--all", f"--timeout={TIMEOUT_S}s")
        self._cluster.kubectl(*wait)
        (text,) = (data[CONFIG] for each in chart if CONFIG in (data := each.get("data") or {}))
        configuration = yaml.safe_load(text)
        configuration["health"]["healthProbeBindAddress"] = f"127.0.0.1:{self._health_port}"
        configuration["metrics"]["bindAddress"] = "0"
        configuration["leaderElection"]["leaderElect"] = False
        configuration["webhook"] = {"port": self._webhook_port, "certDir": str(self._layout.pki)}
        (self._layout.etc / CONFIG).write_text(yaml.safe_dump(configuration))

    def _has_certificate(self) -> bool:
        """Write the certificate where the controller looks for it, once it has made one."""
        path = f"/api/v1/namespaces/{NAMESPACE}/secrets/{CERTIFICATE}"
        data = self._cluster.kube.get(path).get("data") or {}
        for name in ("ca.crt", "tls.key", "tls.crt"):
            if name in data:
                (self._layout.pki / name).write_bytes(base64.b64decode(data[name]))
        return "tls.crt" in data

    def _is_ready(self) -> bool:
        try:
            url = f"http://127.0.0.1:{self._health_port}/readyz"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        self._processes.wait_for("kueue", is_so, timeout_s=TIMEOUT_S)


def _webhook_clients(document: Document) -> Iterator[Document]:
    """Yield where a document says how its webhooks are reached."""
    for webhook in document.get("webhooks") or ():
        yield webhook["clientConfig"]
    if conversion := (document.get("spec") or {}).get("conversion"):
        yield conversion["webhook"]["clientConfig"]
