"""Command lines and configuration of the node's servers: kubelet, kube-proxy and DNS."""

import json
from pathlib import Path

from hack.cluster import containerd
from hack.cluster.control_plane import ControlPlane
from hack.cluster.kubeconfigs import CONTEXT
from hack.cluster.places import write_if_changed
from hack.cluster.processes import Server

NAME = "node0"


def kubelet(plane: ControlPlane) -> Server:
    """Return the kubelet."""
    layout = plane.layout
    kubeconfig, config = layout.etc / "kubelet.kubeconfig", layout.etc / "kubelet.json"
    write_if_changed(config, json.dumps(kubelet_config(plane), indent=2))
    data = layout.data / "kubelet"
    argv = (
        str(plane.binaries / "kubelet"),
        f"--config={config}",
        f"--kubeconfig={kubeconfig}",
        f"--root-dir={data}",
        f"--cert-dir={data / 'pki'}",
        f"--hostname-override={NAME}",
        f"--node-ip={plane.network.node_address}",
    )
    return Server(name="kubelet", argv=argv, reads=(kubeconfig, config))


def kubelet_config(plane: ControlPlane) -> dict[str, object]:
    """Return the kubelet's configuration."""
    layout, pki = plane.layout, plane.layout.pki
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": plane.network.node_address,
        "port": plane.ports.kubelet,
        "containerRuntimeEndpoint": f"unix://{containerd.socket_path(layout)}",
        # Works with and without systemd, on both versions of control groups.
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(pki / "kubelet.crt"),
        "tlsPrivateKeyFile": str(pki / "kubelet.key"),
        "clusterDNS": [plane.network.node_address],
        "clusterDomain": "cluster.local",
        "resolvConf": str(_resolv_conf(plane)),
        "podLogsDir": str(layout.logs / "pods"),
        "volumePluginDir": str(layout.data / "kubelet-plugins"),
        # The kubelet counts a disk's reserve as used. Unused images would be deleted early, and an
        # imported one cannot be pulled again.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
            "nodefs.inodesFree": "1%",
        },
    }


def proxy(plane: ControlPlane) -> Server:
    """Return kube-proxy."""
    kubeconfig, config = plane.layout.etc / "proxy.kubeconfig", plane.layout.etc / "proxy.json"
    document = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "clusterCIDR": plane.network.pod_range,
        "hostnameOverride": NAME,
        # Zero leaves the host's connection table as it is; a container may not change it.
        "conntrack": {
            "maxPerCore": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
    }
    write_if_changed(config, json.dumps(document, indent=2))
    argv = (str(plane.binaries / "kube-proxy"), f"--config={config}")
    return Server(name="kube-proxy", argv=argv, reads=(kubeconfig, config))


def dns(plane: ControlPlane) -> Server:
    """Return CoreDNS on the host: no image, no Deployment, answers before the first pod starts."""
    kubeconfig, config = plane.layout.etc / "dns.kubeconfig", plane.layout.etc / "Corefile"
    upstream = Path("/etc/resolv.conf")
    has_upstream = upstream.exists() and "nameserver" in upstream.read_text()
    # Without a name server the forward plugin refuses to start; the cluster's own names still work.
    forward = f"forward . {upstream}" if has_upstream else ""
    text = f"""\
.:{plane.ports.dns} {{
    bind {plane.network.node_address}
    errors
    cache 5
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        kubeconfig {kubeconfig} {CONTEXT}
        fallthrough in-addr.arpa ip6.arpa
    }}
    {forward}
}}
"""
    write_if_changed(config, text)
    argv = (str(plane.binaries / "coredns"), "-conf", str(config))
    return Server(name="coredns", argv=argv, reads=(kubeconfig, config))


def _resolv_conf(plane: ControlPlane) -> Path:
    # The host's search domains would be tried for every short name a pod looks up.
    path = plane.layout.etc / "resolv.conf"
    write_if_changed(path, f"nameserver {plane.network.node_address}\n")
    return path
