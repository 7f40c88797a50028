"""manifests/install.yaml: the chart with its defaults in one file, for `kubectl apply`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from hack.cluster import gobuild

NAMESPACE = "mizzen-system"
HEADER = f"""\
# Generated from charts/mizzen by `make chart`: the chart with its defaults, without Helm.
#
#   kubectl apply --server-side -f install.yaml
#   kubectl -n {NAMESPACE} wait --for=condition=Available deployment --all --timeout=5m
#
# It asks for the images mizzen/control and mizzen/runtime; for others use the chart.
apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    pod-security.kubernetes.io/enforce: restricted
"""


def find_helm() -> Path | None:
    """Return the helm built for the local cluster, else the one on the PATH, else None."""
    built = gobuild.binaries() / "helm"
    if built.exists():
        return built
    found = shutil.which("helm")
    return None if found is None else Path(found)


def install_yaml(helm: Path, chart: Path) -> str:
    """Render the one-file install.

    Raises:
        subprocess.CalledProcessError: the chart does not render; helm's words are in its stderr.
    """
    done = subprocess.run(
        [
            helm, "template", "mizzen", chart,
            "--namespace", NAMESPACE,
            "--no-hooks", "--skip-tests",
            "--set", "adminToken.source=Job,crds.keep=false",
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    # Who rendered it is of no interest to a cluster without Helm.
    lines = [
        line
        for line in done.stdout.splitlines()
        if not line.startswith("# Source:") and "helm.sh/chart" not in line and line.strip()
    ]
    text = "\n".join(lines).replace("app.kubernetes.io/managed-by: Helm", _MANAGED_BY)
    return f"{HEADER}{text}\n"


_MANAGED_BY = "app.kubernetes.io/managed-by: kubectl"
