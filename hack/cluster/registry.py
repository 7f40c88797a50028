"""The local registry: images travel as on any cluster, and only changed layers do."""

import urllib.error
import urllib.request

from hack.cluster.pins import load_pins
from hack.cluster.places import Layout, write_if_changed
from hack.cluster.processes import Processes, Server


def address() -> str:
    """Return host and port, the first part of every image name."""
    return f"127.0.0.1:{load_pins().ports.registry}"


def server(layout: Layout) -> Server:
    """Return Debian's registry; on loopback, where containerd and buildah speak plain HTTP."""
    config = layout.etc / "registry.yml"
    text = f"""\
version: 0.1
log: {{level: warn}}
storage:
  delete: {{enabled: true}}
  filesystem: {{rootdirectory: {layout.data / "registry"}}}
http: {{addr: "{address()}"}}
"""
    write_if_changed(config, text)
    argv = ("/usr/bin/docker-registry", "serve", str(config))
    return Server(name="registry", argv=argv, reads=(config,))


def start(layout: Layout, processes: Processes) -> None:
    """Start it and wait until it answers."""
    processes.start(server(layout))
    processes.wait_for("registry", _answers, timeout_s=30)


def _answers() -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address()}/v2/", timeout=2):
            return True
    except (OSError, urllib.error.URLError):
        return False
