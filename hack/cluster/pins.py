"""Versions and addresses, read from the two files that hold them: pins.toml and gomod/go.mod."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hack.cluster.errors import ClusterError

HERE = Path(__file__).parent
MODULE = HERE / "gomod"


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Addresses of the cluster."""

    node_address: str
    service_range: str
    service_address: str
    pod_range: str
    bridge: str
    fake_pod_range: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Ports that the cluster listens on."""

    api: int
    etcd: int
    etcd_peer: int
    kubelet: int = 0
    dns: int = 0
    registry: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """What pins.toml says."""

    debian_suite: str
    debian_packages: tuple[str, ...]
    network: Network
    ports: Ports
    first_build_gib: int
    images_gib: int
    servers_gib: int


@cache
def load_pins() -> Pins:
    """Read pins.toml."""
    document = tomllib.loads((HERE / "pins.toml").read_text())
    return Pins(
        debian_suite=document["debian"]["suite"],
        debian_packages=tuple(document["debian"]["packages"]),
        network=Network(**document["network"]),
        ports=Ports(**document["ports"]),
        **document["disk"],
    )


def module_version(module: str, go_mod: str) -> str:
    """Return the version that a go.mod text requires of a module."""
    found = re.search(rf"^\s*(?:require\s+)?{re.escape(module)}\s+(v\S+)", go_mod, re.MULTILINE)
    if found is None:
        raise ClusterError(f"go.mod does not require {module}; add it with `go get {module}`.")
    return found.group(1)
