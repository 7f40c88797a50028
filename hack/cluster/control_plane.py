"""Command lines of etcd, the API server, the controller manager, the scheduler and kwok."""

import json
from dataclasses import dataclass
from pathlib import Path

from hack.cluster.pins import Network, Ports
from hack.cluster.places import Layout, write_if_changed
from hack.cluster.processes import Server

# Thousands of fake pods are made in tests; the default of 20 requests a second would set the pace.
CLIENT_QPS = 500
POD_STAGES = Path(__file__).parent / "pod_stages.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlane:
    """Where a control plane lives and what it listens on."""

    layout: Layout
    binaries: Path
    network: Network
    ports: Ports
    # 127.0.0.1 keeps it to this machine's users; pods need an address they can route to.
    bind_address: str
    # The endpoint of the Service `kubernetes`, None where no pod could use one.
    advertise_address: str | None
    # How long a simulated pod takes to run once it has a node.
    fake_pod_start_ms: int = 0

    @property
    def url(self) -> str:
        """Where the API server answers."""
        return f"https://{self.bind_address}:{self.ports.api}"


def etcd(plane: ControlPlane) -> Server:
    """Return the store; no fsync, because a development cluster may lose its last second."""
    client = f"http://127.0.0.1:{plane.ports.etcd}"
    peer = f"http://127.0.0.1:{plane.ports.etcd_peer}"
    flags = {
        "name": "node0",
        "data-dir": plane.layout.data / "etcd",
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"node0={peer}",
        "unsafe-no-fsync": "true",
        "log-level": "warn",
    }
    return Server(name="etcd", argv=_argv(plane, "etcd", flags))


def api_server(plane: ControlPlane) -> Server:
    """Return the API server, with RBAC, node restriction, service accounts and pod security on."""
    pki = plane.layout.pki
    flags: dict[str, object] = {
        "etcd-servers": f"http://127.0.0.1:{plane.ports.etcd}",
        "bind-address": plane.bind_address,
        "secure-port": plane.ports.api,
        "service-cluster-ip-range": plane.network.service_range,
        "authorization-mode": "Node,RBAC",
        # ServiceAccount and PodSecurity are on by themselves; naming them keeps them on.
        "enable-admission-plugins": "NodeRestriction,ServiceAccount,PodSecurity",
        "allow-privileged": "true",
        "client-ca-file": pki / "ca.crt",
        "tls-cert-file": pki / "apiserver.crt",
        "tls-private-key-file": pki / "apiserver.key",
        "kubelet-client-certificate": pki / "to-kubelet.crt",
        "kubelet-client-key": pki / "to-kubelet.key",
        "kubelet-certificate-authority": pki / "ca.crt",
        "kubelet-preferred-address-types": "InternalIP",
        "service-account-issuer": "https://kubernetes.default.svc.cluster.local",
        "service-account-key-file": pki / "service-accounts.pub",
        "service-account-signing-key-file": pki / "service-accounts.key",
        "requestheader-client-ca-file": pki / "ca.crt",
        "requestheader-allowed-names": "front-proxy-client",
        "requestheader-username-headers": "X-Remote-User",
        "requestheader-group-headers": "X-Remote-Group",
        "requestheader-extra-headers-prefix": "X-Remote-Extra-",
        "proxy-client-cert-file": pki / "front-proxy.crt",
        "proxy-client-key-file": pki / "front-proxy.key",
    }
    if plane.advertise_address is None:
        # Loopback is refused as an endpoint, and without pods nobody asks for one.
        flags["endpoint-reconciler-type"] = "none"
        flags["advertise-address"] = plane.network.node_address
    else:
        flags["advertise-address"] = plane.advertise_address
    reads = (pki / "ca.crt", pki / "apiserver.crt", pki / "service-accounts.pub")
    return Server(name="kube-apiserver", argv=_argv(plane, "kube-apiserver", flags), reads=reads)


def controller_manager(plane: ControlPlane) -> Server:
    """Return the controllers: garbage collection, service accounts, Deployments and more."""
    pki = plane.layout.pki
    kubeconfig = plane.layout.etc / "controller-manager.kubeconfig"
    flags = {
        "kubeconfig": kubeconfig,
        "root-ca-file": pki / "ca.crt",
        "service-account-private-key-file": pki / "service-accounts.key",
        "cluster-signing-cert-file": pki / "ca.crt",
        "cluster-signing-key-file": pki / "ca.key",
        "use-service-account-credentials": "true",
        "leader-elect": "false",
        "kube-api-qps": CLIENT_QPS,
        "kube-api-burst": CLIENT_QPS * 2,
        "secure-port": 0,
    }
    name = "kube-controller-manager"
    return Server(name=name, argv=_argv(plane, name, flags), reads=(kubeconfig,))


def scheduler(plane: ControlPlane) -> Server:
    """Return the scheduler and write the configuration that its flags cannot say."""
    kubeconfig = plane.layout.etc / "scheduler.kubeconfig"
    config = plane.layout.etc / "scheduler.json"
    document = {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": False},
        "clientConnection": {
            "kubeconfig": str(kubeconfig),
            "qps": CLIENT_QPS,
            "burst": CLIENT_QPS * 2,
        },
    }
    write_if_changed(config, json.dumps(document, indent=2))
    argv = _argv(plane, "kube-scheduler", {"config": config, "secure-port": 0})
    return Server(name="kube-scheduler", argv=argv, reads=(kubeconfig, config))


def kwok(plane: ControlPlane) -> Server:
    """Return kwok, which plays nodes labelled type=kwok and leaves real ones alone."""
    pod_stages = plane.layout.etc / "pod-stages.yaml"
    write_if_changed(pod_stages, POD_STAGES.read_text() % {"start_ms": plane.fake_pod_start_ms})
    stages = (pod_stages, plane.binaries / "node-stages.yaml")
    flags = {
        "kubeconfig": plane.layout.etc / "kwok.kubeconfig",
        "config": ",".join(map(str, stages)),
        "manage-nodes-with-label-selector": "type=kwok",
        "node-lease-duration-seconds": 40,
        "cidr": plane.network.fake_pod_range,
    }
    return Server(name="kwok", argv=_argv(plane, "kwok", flags), reads=stages)


def _argv(plane: ControlPlane, name: str, flags: dict[str, object]) -> tuple[str, ...]:
    return (str(plane.binaries / name), *(f"--{flag}={value}" for flag, value in flags.items()))
