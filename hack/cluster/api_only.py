"""A throw-away control plane without a kubelet: etcd, API server, controllers, scheduler and kwok.

Needs no root and touches nothing outside its folder. Ready in seconds; pods on kwok's nodes become
Running and, once their readiness gates are True, Ready.
"""

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from hack.cluster import certs, control_plane, fake_nodes, gobuild
from hack.cluster.errors import ClusterError
from hack.cluster.kubeapi import KubeApi
from hack.cluster.kubeconfigs import write_kubeconfig
from hack.cluster.pins import Ports, load_pins
from hack.cluster.places import Layout
from hack.cluster.processes import Processes
from hack.ports import free_ports

LOOPBACK = "127.0.0.1"
CLIENTS = ("controller-manager", "scheduler")
TIMEOUT_S = 300.0


class ApiCluster:
    """An API-only cluster; as a context manager it is gone at the end, with its folder.

    with ApiCluster() as cluster:
        cluster.add_nodes(2, gpus=8)
        cluster.kubectl("apply", "-f", "manifests/crds")
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        die_with_parent: bool = True,
        pod_start_ms: int = 0,
    ) -> None:
        """Take the folder for its state, or make one, and the time that pods take to start."""
        self.directory = directory or Path(tempfile.mkdtemp(prefix="mizzen-api-"))
        self._layout = Layout(self.directory.resolve())
        self._processes = Processes(self._layout, die_with_parent=die_with_parent)
        self._binaries = gobuild.binaries()
        self._ports: Ports | None = None
        self._pod_start_ms = pod_start_ms

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self._layout.kubeconfig

    @property
    def url(self) -> str:
        """Where the API server answers."""
        return self._plane().url

    @property
    def kube(self) -> KubeApi:
        """The API server, for the few requests that need no kubectl."""
        return KubeApi(self.url, self._layout.pki)

    def start(self) -> Self:
        """Start what is not running and wait until pods can be created."""
        self._binaries = gobuild.build()
        self._layout.create()
        plane = self._plane()
        self._create_credentials(plane)
        self._processes.start(control_plane.etcd(plane))
        self._processes.start(control_plane.api_server(plane))
        kube = self.kube
        self._processes.wait_for("kube-apiserver", kube.is_ready, timeout_s=TIMEOUT_S)
        for server in (control_plane.controller_manager, control_plane.scheduler):
            self._processes.start(server(plane))
        self._processes.start(control_plane.kwok(plane))
        # Until the controllers have made it, pods in this namespace are refused.
        self.wait_for_service_account("default")
        return self

    def stop(self) -> None:
        """End every server and remove what start made."""
        # Nothing here is worth a graceful end. Clients go before what they talk to.
        for name in ("kwok", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"):
            self._processes.stop(name, sign=signal.SIGKILL)
        layout = self._layout
        for folder in (layout.data, layout.etc, layout.logs, layout.pki, layout.run):
            shutil.rmtree(folder, ignore_errors=True)
        self.kubeconfig.unlink(missing_ok=True)
        (layout.root / "ports").unlink(missing_ok=True)
        # Only ours: a folder that holds something else stays.
        if layout.root.is_dir() and not any(layout.root.iterdir()):
            layout.root.rmdir()

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl as the administrator and return what it printed."""
        done = subprocess.run(
            [self._binaries / "kubectl", f"--kubeconfig={self.kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def add_nodes(
        self, count: int, *, gpus: int = 8, prefix: str = "gpu-", tainted: bool = False
    ) -> list[str]:
        """Create fake nodes with GPUs and return their names; kwok soon makes them Ready."""
        names = [f"{prefix}{number}" for number in range(count)]
        fake_nodes.add_nodes(self.kube, names, gpus=gpus, cpus=64, memory_gib=512, tainted=tainted)
        return names

    def create_namespace(self, name: str) -> str:
        """Create a namespace and wait until pods can be created in it."""
        document = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        self.kube.create("/api/v1/namespaces", document)
        self.wait_for_service_account(name)
        return name

    def wait_for_service_account(self, namespace: str) -> None:
        """Wait until the controllers have made the namespace's default service account."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default"
        self._processes.wait_for(
            "kube-controller-manager", lambda: self.kube.get(path) is not None, timeout_s=TIMEOUT_S
        )

    def log(self, server: str) -> Path:
        """Return a server's log file."""
        return self._processes.log(server)

    def __enter__(self) -> Self:
        """Start."""
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()

    def _plane(self) -> control_plane.ControlPlane:
        return control_plane.ControlPlane(
            layout=self._layout,
            binaries=self._binaries,
            network=load_pins().network,
            ports=self._chosen_ports(),
            bind_address=LOOPBACK,
            advertise_address=None,
            fake_pod_start_ms=self._pod_start_ms,
        )

    def _chosen_ports(self) -> Ports:
        """Return the cluster's ports, the same ones after a restart."""
        if self._ports is None:
            record = self._layout.root / "ports"
            if record.exists():
                chosen = [int(word) for word in record.read_text().split()]
            else:
                chosen = free_ports(3)
                record.parent.mkdir(parents=True, exist_ok=True)
                record.write_text(" ".join(map(str, chosen)))
            self._ports = Ports(api=chosen[0], etcd=chosen[1], etcd_peer=chosen[2])
        return self._ports

    def _create_credentials(self, plane: control_plane.ControlPlane) -> None:
        pki = self._layout.pki
        wanted = certs.identities(
            addresses=(LOOPBACK, plane.network.service_address), node="node0", node_address=LOOPBACK
        )
        certs.create(pki, wanted)
        for identity in CLIENTS:
            path = self._layout.etc / f"{identity}.kubeconfig"
            write_kubeconfig(path, server=plane.url, pki=pki, identity=identity)
        for path in (self._layout.etc / "kwok.kubeconfig", self.kubeconfig):
            write_kubeconfig(path, server=plane.url, pki=pki, identity="admin")
