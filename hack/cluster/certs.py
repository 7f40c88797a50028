"""Certificates of the cluster, made with openssl: one authority, one identity for each server.

Separate identities keep RBAC honest; the default roles of Kubernetes cover all of these names.
"""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hack.cluster.errors import ClusterError

# The cluster is thrown away long before; a short life would only make a forgotten one fail oddly.
DAYS = "3650"
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One certificate: a file name, a user name, groups, and the names it serves under."""

    file: str
    user: str
    group: str = ""
    hosts: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """The subject line as openssl reads it."""
        return (f"/O={self.group}" if self.group else "") + f"/CN={self.user}"

    @property
    def usage(self) -> str:
        """Servers here are clients too."""
        return "serverAuth,clientAuth" if self.hosts else "clientAuth"


def identities(*, addresses: tuple[str, ...], node: str, node_address: str) -> list[Identity]:
    """Return every identity of a cluster whose API server answers at `addresses`."""
    names = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
    return [
        Identity(
            file="apiserver",
            user="kube-apiserver",
            hosts=(*addresses, *names, "kubernetes.default.svc.cluster.local"),
        ),
        Identity(file="admin", user="kubernetes-admin", group="system:masters"),
        Identity(file="to-kubelet", user="apiserver-to-kubelet", group="system:masters"),
        Identity(file="front-proxy", user="front-proxy-client"),
        Identity(file="controller-manager", user="system:kube-controller-manager"),
        Identity(file="scheduler", user="system:kube-scheduler"),
        Identity(file="proxy", user="system:kube-proxy"),
        Identity(file="dns", user="kubernetes-dns", group="system:masters"),
        Identity(
            file="kubelet",
            user=f"system:node:{node}",
            group="system:nodes",
            hosts=(node_address, node),
        ),
    ]


def create(folder: Path, wanted: list[Identity]) -> None:
    """Make the authority, the key for service account tokens and every identity, where missing."""
    complete = folder / "complete"
    listing = "\n".join(map(repr, wanted))
    # Written last, so that a half-made set is made again as a whole.
    if complete.exists() and complete.read_text() == listing:
        return
    complete.unlink(missing_ok=True)
    _openssl(
        *("req", "-x509", *KEY, "-days", DAYS, "-subj", "/CN=mizzen-local-cluster"),
        *("-keyout", folder / "ca.key", "-out", folder / "ca.crt"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )
    _openssl(
        *("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-out", folder / "service-accounts.key"),
    )
    private = folder / "service-accounts.key"
    _openssl("pkey", "-in", private, "-pubout", "-out", folder / "service-accounts.pub")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda identity: _sign(folder, identity), wanted))
    for key in folder.glob("*.key"):
        key.chmod(0o600)
    complete.write_text(listing)


def _sign(folder: Path, identity: Identity) -> None:
    extensions = ["basicConstraints=critical,CA:FALSE", f"extendedKeyUsage={identity.usage}"]
    if identity.hosts:
        extensions.append("subjectAltName=" + ",".join(map(_alternative_name, identity.hosts)))
    _openssl(
        *("req", "-x509", *KEY, "-days", DAYS, "-subj", identity.subject),
        *("-CA", folder / "ca.crt", "-CAkey", folder / "ca.key"),
        *("-keyout", folder / f"{identity.file}.key", "-out", folder / f"{identity.file}.crt"),
        *(word for extension in extensions for word in ("-addext", extension)),
    )


def _alternative_name(host: str) -> str:
    return f"IP:{host}" if host.replace(".", "").isdigit() else f"DNS:{host}"


def _openssl(*arguments: str | Path) -> None:
    command = ["openssl", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as missing:
        raise ClusterError("openssl is missing: install the package openssl.") from missing
    if done.returncode != 0:
        raise ClusterError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
