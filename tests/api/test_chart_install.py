"""The chart on a real API server: Helm installs, upgrades, uninstalls; the roles are enough."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.cluster import gobuild
from hack.cluster.api_only import ApiCluster
from hack.cluster.errors import ClusterError
from mizzen.runtime.gateway.admin_token import ensure_token
from mizzen.runtime.gateway.kube import KubeError, connect

CHART = "charts/mizzen"
HOME = "mizzen-system"
MODEL = {
    "apiVersion": "mizzen.dev/v1alpha1",
    "kind": "LLMDeployment",
    "metadata": {"name": "tiny", "namespace": "team"},
    "spec": {"model": {"source": "pvc://models/tiny"}},
}


@pytest.fixture(scope="module")
def bare() -> Iterator[ApiCluster]:
    """An API server that has never heard of us."""
    with ApiCluster() as cluster:
        cluster.add_nodes(2)
        for name in (HOME, "team"):
            cluster.kubectl("create", "namespace", name)
            cluster.wait_for_service_account(name)
        cluster.kubectl("label", "namespace", HOME, "pod-security.kubernetes.io/enforce=restricted")
        yield cluster


def helm(cluster: ApiCluster, *arguments: str) -> str:
    done = subprocess.run(
        [
            gobuild.binaries() / "helm",
            *arguments,
            "--namespace",
            HOME,
            f"--kubeconfig={cluster.kubeconfig}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def get(cluster: ApiCluster, *arguments: str) -> Any:
    return json.loads(cluster.kubectl("get", *arguments, "--output=json"))


@pytest.fixture(scope="module")
def installed(bare: ApiCluster) -> ApiCluster:
    """The chart installed as the README says, its pods Ready on simulated nodes."""
    notes = helm(bare, "upgrade", "--install", "mizzen", CHART, "--wait", "--timeout", "8m")
    assert "mizzen keys create" in notes
    return bare


@pytest.fixture(scope="module")
def operator(installed: ApiCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kubeconfig that may do what the operator may."""
    return _kubeconfig_of(installed, "mizzen-operator", tmp_path_factory.mktemp("operator"))


def _kubeconfig_of(cluster: ApiCluster, account: str, folder: Path) -> Path:
    token = cluster.kubectl("create", "token", account, "-n", HOME).strip()
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


def as_account(cluster: ApiCluster, kubeconfig: Path, *arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        [gobuild.binaries() / "kubectl", f"--kubeconfig={kubeconfig}", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ClusterError(done.stderr)
    return done.stdout


def test_the_pods_pass_the_restricted_level_and_get_ready(installed: ApiCluster) -> None:
    for name in ("mizzen-operator", "mizzen-gateway"):
        deployment = get(installed, "deployment", name, "-n", HOME)
        assert deployment["status"]["readyReplicas"] == 2


def test_an_upgrade_keeps_the_admin_token_and_brings_new_crds(installed: ApiCluster) -> None:
    before = get(installed, "secret", "mizzen-admin", "-n", HOME)["data"]["token"]
    assert len(base64.b64decode(before)) == 48
    installed.kubectl(
        "label", "crd", "llmdeployments.mizzen.dev", "app.kubernetes.io/part-of=old", "--overwrite"
    )
    helm(installed, "upgrade", "mizzen", CHART, "--force-conflicts", "--wait", "--timeout", "8m")
    assert get(installed, "secret", "mizzen-admin", "-n", HOME)["data"]["token"] == before
    crd = get(installed, "crd", "llmdeployments.mizzen.dev")
    assert crd["metadata"]["labels"]["app.kubernetes.io/part-of"] == "mizzen"


OPERATOR_MAY = [
    *(("list", kind) for kind in ("llmdeployments", "finetunejobs", "pods", "services")),
    *(("watch", kind) for kind in ("llmdeployments", "poddisruptionbudgets", "networkpolicies")),
    *(("create", kind) for kind in ("pods", "services", "configmaps", "events")),
    *(("delete", kind) for kind in ("pods", "services", "configmaps", "controllerrevisions")),
    ("patch", "pods --subresource=status"),
    ("patch", "llmdeployments --subresource=status"),
    ("patch", "finetunejobs --subresource=status"),
    ("get", "persistentvolumeclaims"),
    ("get", "secrets/mizzen-admin"),
    ("list", "nodes"),
]
OPERATOR_MAY_NOT = [
    ("list", "secrets"),
    ("get", "secrets/other"),
    ("delete", "llmdeployments"),
    ("patch", "llmdeployments"),
    ("update", "pods --subresource=status"),
    ("create", "pods --subresource=exec"),
    ("create", "deployments"),
    ("create", "rolebindings"),
    ("get", "nodes"),
    ("delete", "persistentvolumeclaims"),
]


@pytest.mark.parametrize(("verb", "what"), OPERATOR_MAY, ids=lambda word: str(word))
def test_the_operator_may(installed: ApiCluster, operator: Path, verb: str, what: str) -> None:
    as_account(installed, operator, "auth", "can-i", verb, *what.split(), "-n", "team")


@pytest.mark.parametrize(("verb", "what"), OPERATOR_MAY_NOT, ids=lambda word: str(word))
def test_the_operator_may_not(installed: ApiCluster, operator: Path, verb: str, what: str) -> None:
    with pytest.raises(ClusterError):
        as_account(installed, operator, "auth", "can-i", verb, *what.split(), "-n", "team")


def test_the_operator_copies_its_token_and_no_other_secret(
    installed: ApiCluster, operator: Path
) -> None:
    def apply(name: str) -> str:
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": "team"},
            "stringData": {"token": "x"},
        }
        return as_account(
            installed,
            operator,
            *("apply", "--server-side", "--field-manager=mizzen-operator", "--validate=false"),
            *("-f", "-"),
            stdin=json.dumps(secret),
        )

    assert "serverside-applied" in apply("mizzen-admin")
    with pytest.raises(ClusterError, match="forbidden"):
        apply("other")
    as_account(installed, operator, "delete", "secret", "mizzen-admin", "-n", "team")


def test_users_with_the_clusters_own_roles_get_models_too(installed: ApiCluster) -> None:
    for role, verb, expected in (
        ("view", "list", "yes"),
        ("view", "create", "no"),
        ("edit", "create", "yes"),
        ("edit", "delete", "yes"),
    ):
        user = f"{role}er"
        installed.kubectl(
            *("create", "rolebinding", f"{role}-{verb}", "-n", "team"),
            *(f"--clusterrole={role}", f"--user={user}"),
        )
        try:
            answer = installed.kubectl(
                "auth", "can-i", verb, "llmdeployments", "-n", "team", f"--as={user}"
            )
        except ClusterError:
            answer = "no"
        assert answer.strip() == expected, (role, verb)


@pytest.mark.parametrize("folder", ["quickstart", "examples"])
def test_the_manifests_are_accepted_as_they_are(installed: ApiCluster, folder: str) -> None:
    installed.kubectl("apply", "-f", "manifests/quickstart/namespace.yaml")
    said = installed.kubectl(
        "apply", "--dry-run=server", "--validate=strict", "-f", f"manifests/{folder}"
    )
    files = len(list(Path(f"manifests/{folder}").glob("*.yaml")))
    assert said.count("server dry run") == files


def test_uninstalling_leaves_the_models_and_their_kinds(installed: ApiCluster) -> None:
    installed.kubectl("apply", "-f", "-", stdin=json.dumps(MODEL))
    helm(installed, "uninstall", "mizzen", "--wait")
    assert get(installed, "llmdeployment", "tiny", "-n", "team")["spec"]["model"]
    with pytest.raises(ClusterError, match="NotFound"):
        installed.kubectl("get", "deployment", "mizzen-operator", "-n", HOME)
    # And the chart takes the kinds over again.
    helm(installed, "install", "mizzen", CHART, "--wait", "--timeout", "8m")
    helm(installed, "uninstall", "mizzen", "--wait")


async def test_the_one_file_install_makes_its_own_token(bare: ApiCluster, tmp_path: Path) -> None:
    install = ("-f", "manifests/install.yaml")
    said = bare.kubectl("apply", "--server-side", "--force-conflicts", *install)
    assert said.count("serverside-applied") == said.count("\n")
    # Simulated nodes run nothing, so what the Job would run is run here, as the Job's account.
    kubeconfig = _kubeconfig_of(bare, "mizzen-admin-token", tmp_path)
    async with await connect(kubeconfig) as kube:
        assert await ensure_token(kube, HOME)
        assert not await ensure_token(kube, HOME)
        with pytest.raises(KubeError, match="forbidden"):
            await kube.call("GET", f"/api/v1/namespaces/{HOME}/secrets")
    assert get(bare, "secret", "mizzen-admin", "-n", HOME)["data"]["token"]
    bare.kubectl("delete", *install, "--wait=false")
