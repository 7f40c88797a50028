"""containerd with its own folders and socket, beside any other on the machine."""

import json
from pathlib import Path

from hack.cluster import pause_image
from hack.cluster.host import run, succeeds
from hack.cluster.pins import Network
from hack.cluster.places import Layout, write_if_changed
from hack.cluster.processes import Processes, Server

NAMESPACE = "k8s.io"
CNI_NETWORK = "mizzen"


def socket_path(layout: Layout) -> Path:
    """Return where containerd listens."""
    return layout.run / "containerd.sock"


def config_text(layout: Layout) -> str:
    """Return containerd's configuration."""
    data = layout.data / "containerd"
    return f"""\
version = 2
root = "{data}"
state = "{layout.run / "containerd"}"
[grpc]
address = "{socket_path(layout)}"
[plugins."io.containerd.internal.v1.opt"]
path = "{data / "opt"}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause_image.NAME}"
# Lowering the out-of-memory score needs CAP_SYS_RESOURCE, which many machines lack.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{layout.etc / "cni"}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
# Compressed layers are in the registry, on the same disk.
discard_unpacked_layers = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"""


def cni_text(layout: Layout, network: Network) -> str:
    """Return the pods' network: a bridge with addresses from one range."""
    plugins = [
        {
            "type": "bridge",
            "bridge": network.bridge,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": network.pod_range}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": str(layout.run / "addresses"),
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
        # Where another tool set the forward policy to drop, as Docker does, pods are let through.
        {"type": "firewall"},
    ]
    document = {"cniVersion": "1.0.0", "name": CNI_NETWORK, "plugins": plugins}
    return json.dumps(document, indent=2)


def server(layout: Layout, network: Network) -> Server:
    """Return containerd and write its files."""
    config, cni = layout.etc / "containerd.toml", layout.etc / "cni" / "mizzen.conflist"
    cni.parent.mkdir(exist_ok=True)
    write_if_changed(config, config_text(layout))
    write_if_changed(cni, cni_text(layout, network))
    argv = ("/usr/bin/containerd", "--config", str(config), "--log-level", "warn")
    return Server(name="containerd", argv=argv, reads=(config, cni), keeps_proxy=True)


def wait_until_ready(layout: Layout, processes: Processes) -> None:
    """Wait until containerd answers."""
    # On a dead socket ctr would wait ten seconds.
    probe = ("timeout", "1", "ctr", "--address", socket_path(layout), "version")
    processes.wait_for("containerd", lambda: succeeds(*probe), timeout_s=60)


def import_pause_image(layout: Layout, binaries: Path) -> None:
    """Make the pause image known; every pod starts with it."""
    ctr = ("ctr", "--address", socket_path(layout), "--namespace", NAMESPACE)
    if pause_image.NAME in run(*ctr, "images", "list", "--quiet").split():
        return
    archive = layout.run / "pause.tar"
    pause_image.write_archive(binaries / "pause", archive)
    run(*ctr, "images", "import", archive)
    archive.unlink()
