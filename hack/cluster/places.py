"""Where things lie on this machine: caches that can be made again, and the cluster's state."""

import os
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def cache_root() -> Path:
    """Return the folder of things that are slow to make and safe to delete."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mizzen"


def cluster_state_root() -> Path:
    """Return the folder of the local cluster's state."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "mizzen" / "cluster"


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of one cluster, below one root.

    Names are short because Unix socket paths end at 107 bytes.
    """

    root: Path

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.root / "pki"

    @property
    def etc(self) -> Path:
        """Configuration files."""
        return self.root / "etc"

    @property
    def logs(self) -> Path:
        """One log file a server."""
        return self.root / "log"

    @property
    def run(self) -> Path:
        """Process records and sockets."""
        return self.root / "run"

    @property
    def data(self) -> Path:
        """What the servers store."""
        return self.root / "data"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.root / "kubeconfig"

    def create(self) -> None:
        """Make the folders; only this user may look into the keys."""
        # 0755 and not the caller's umask: containers run as other users and pass through data/.
        for folder in (self.root, self.pki, self.etc, self.logs, self.run, self.data):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)
        self.pki.chmod(0o700)


def write_if_changed(path: Path, text: str) -> None:
    """Write a file unless it already says so.

    kube-proxy exits when its configuration is rewritten, even with the same content.
    """
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
