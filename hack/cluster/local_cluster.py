"""The real cluster on this machine: the order in which it starts and stops."""

import shutil
import signal
from datetime import UTC, datetime
from pathlib import Path

from hack.cluster import (
    certs,
    containerd,
    control_plane,
    facts,
    fake_nodes,
    gobuild,
    host_settings,
    node,
    packages,
    preflight,
    registry,
    traces,
)
from hack.cluster.errors import ClusterError
from hack.cluster.kubeapi import KubeApi
from hack.cluster.kubeconfigs import write_kubeconfig
from hack.cluster.pins import load_pins
from hack.cluster.places import Layout, cluster_state_root
from hack.cluster.processes import Processes
from hack.cluster.progress import say, step

# The order of stopping: first who starts containers, then who is asked, then who stores.
# Killed where a graceful end takes long and saves nothing.
STOPS = (
    ("kube-proxy", signal.SIGKILL),
    ("coredns", signal.SIGKILL),
    ("kwok", signal.SIGKILL),
    ("kube-scheduler", signal.SIGKILL),
    ("kube-controller-manager", signal.SIGKILL),
    ("kube-apiserver", signal.SIGKILL),
    ("containerd", signal.SIGTERM),
    ("registry", signal.SIGTERM),
    ("etcd", signal.SIGTERM),
)
SERVERS = ("kubelet", *(name for name, _ in STOPS if name != "kwok"))
CLIENTS = ("controller-manager", "scheduler", "proxy", "kubelet", "dns")
TIMEOUT_S = 180.0


class LocalCluster:
    """The one cluster of this user on this machine."""

    def __init__(self) -> None:
        """Take the state folder from the environment."""
        self.layout = Layout(cluster_state_root())
        self.processes = Processes(self.layout)
        self.pins = load_pins()

    @property
    def kube(self) -> KubeApi:
        """The API server."""
        return KubeApi(self._plane(Path()).url, self.layout.pki)

    def check(self) -> None:
        """Refuse, before anything is changed, what cannot work."""
        problems = preflight.find_problems(facts.gather(self.layout, self.pins))
        if problems:
            raise ClusterError("\n       ".join(problems))

    def prepare_tools(self) -> None:
        """Check the machine and install what is missing."""
        self.check()
        packages.install(self.pins.debian_packages)

    def start_registry(self) -> None:
        """Start the registry alone: images can be built before the cluster is up."""
        self.prepare_tools()
        self.layout.create()
        registry.start(self.layout, self.processes)

    def up(self) -> None:
        """Bring the cluster to running, from whatever state it was left in."""
        self.prepare_tools()
        binaries = gobuild.build()
        self.layout.create()
        plane = self._plane(binaries)
        if self.processes.running("containerd") is None:
            self._clean_after_crash()
        host_settings.prepare(self.layout, plane.network)
        with step("Started etcd, containerd, the registry and the API server"):
            self._create_credentials(plane)
            self.processes.start(control_plane.etcd(plane))
            self.processes.start(containerd.server(self.layout, plane.network))
            self.processes.start(control_plane.api_server(plane))
            registry.start(self.layout, self.processes)
            containerd.wait_until_ready(self.layout, self.processes)
            containerd.import_pause_image(self.layout, binaries)
            self.processes.wait_for("kube-apiserver", self.kube.is_ready, timeout_s=TIMEOUT_S)
        with step("Started the controllers and the node"):
            for server in (
                control_plane.controller_manager,
                control_plane.scheduler,
                node.dns,
                node.proxy,
            ):
                self.processes.start(server(plane))
            if self._kwok_kubeconfig.exists():
                self.processes.start(control_plane.kwok(plane))
            self._start_kubelet(plane)
            self.processes.wait_for(
                "kube-controller-manager", self._has_service_account, timeout_s=TIMEOUT_S
            )

    def down(self, *, purge: bool) -> None:
        """Stop everything and leave nothing on the host; the state stays unless purged."""
        self.processes.stop("kubelet")
        traces.kill_containers(self.layout)
        for name, sign in STOPS:
            self.processes.stop(name, sign=sign)
        traces.remove(self.layout)
        host_settings.restore(self.layout, self.pins.network)
        if purge:
            shutil.rmtree(self.layout.root, ignore_errors=True)

    def missing_servers(self) -> list[str]:
        """Return the servers that do not run."""
        return [name for name in SERVERS if self.processes.running(name) is None]

    def set_fake_gpus(self, count: int) -> None:
        """Give the node GPUs in name only."""
        self._require_running()
        fake_nodes.set_fake_gpus(self.kube, node.NAME, count)

    def add_fake_nodes(self, count: int, *, gpus: int) -> None:
        """Start kwok and give it nodes."""
        self._require_running()
        binaries = gobuild.build()
        plane = self._plane(binaries)
        write_kubeconfig(
            self._kwok_kubeconfig, server=plane.url, pki=self.layout.pki, identity="admin"
        )
        self.processes.start(control_plane.kwok(plane))
        names = [f"fake-{number}" for number in range(count)]
        fake_nodes.add_nodes(self.kube, names, gpus=gpus, cpus=64, memory_gib=512, tainted=True)

    @property
    def _kwok_kubeconfig(self) -> Path:
        # Its presence says that the cluster has fake nodes, which need kwok after a restart, too.
        return self.layout.etc / "kwok.kubeconfig"

    def _require_running(self) -> None:
        if self.missing_servers():
            raise ClusterError(
                "The cluster is not running: start it with `python3 -m hack.cluster up`."
            )

    def _clean_after_crash(self) -> None:
        """Make a start after a crash the same as a start after a reboot."""
        if not host_settings.was_prepared(self.layout):
            return  # never started here, so whatever is there is somebody else's
        # Who talks to a containerd that is gone is started again after the clean-up, too.
        if self.processes.running("kubelet") is not None:
            self.processes.stop("kubelet")
        if traces.control_groups() or traces.mounts_below(self.layout.root):
            say("Cleaning up after a cluster whose processes were killed.")
        traces.remove(self.layout)
        host_settings.sweep(self.layout, self.pins.network)

    def _start_kubelet(self, plane: control_plane.ControlPlane) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        # What an earlier kubelet said about the node is still stored, and counts for nothing.
        since = now if self.processes.start(node.kubelet(plane)) else ""
        self.processes.wait_for("kubelet", lambda: self._is_ready(since), timeout_s=TIMEOUT_S)

    def _is_ready(self, since: str) -> bool:
        document = self.kube.get(f"/api/v1/nodes/{node.NAME}") or {}
        return any(
            one["type"] == "Ready" and one["status"] == "True" and one["lastHeartbeatTime"] >= since
            for one in document.get("status", {}).get("conditions", [])
        )

    def _has_service_account(self) -> bool:
        path = "/api/v1/namespaces/default/serviceaccounts/default"
        return self.kube.get(path) is not None

    def _plane(self, binaries: Path) -> control_plane.ControlPlane:
        address = self.pins.network.node_address
        return control_plane.ControlPlane(
            layout=self.layout,
            binaries=binaries,
            network=self.pins.network,
            ports=self.pins.ports,
            bind_address=address,
            advertise_address=address,
        )

    def _create_credentials(self, plane: control_plane.ControlPlane) -> None:
        network, pki = plane.network, self.layout.pki
        wanted = certs.identities(
            addresses=("127.0.0.1", network.node_address, network.service_address),
            node=node.NAME,
            node_address=network.node_address,
        )
        certs.create(pki, wanted)
        for identity in CLIENTS:
            path = self.layout.etc / f"{identity}.kubeconfig"
            write_kubeconfig(path, server=plane.url, pki=pki, identity=identity)
        write_kubeconfig(self.layout.kubeconfig, server=plane.url, pki=pki, identity="admin")
