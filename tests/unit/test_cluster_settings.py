"""How the cluster's servers are told to run."""

import json
import tarfile
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

from hack.cluster import certs, containerd, control_plane, fake_nodes, node, pause_image
from hack.cluster.control_plane import ControlPlane
from hack.cluster.host import run
from hack.cluster.pins import load_pins
from hack.cluster.places import Layout, write_if_changed
from hack.cluster.processes import Server


@pytest.fixture
def plane(tmp_path: Path) -> ControlPlane:
    """A control plane as `up` would start it, below a temporary folder."""
    layout = Layout(tmp_path)
    layout.create()
    pins = load_pins()
    return ControlPlane(
        layout=layout,
        binaries=tmp_path / "bin",
        network=pins.network,
        ports=pins.ports,
        bind_address=pins.network.node_address,
        advertise_address=pins.network.node_address,
    )


def _flags(server: Server) -> dict[str, str]:
    return dict(flag.removeprefix("--").split("=", 1) for flag in server.argv[1:])


def test_the_api_server_enforces_what_production_does(plane: ControlPlane) -> None:
    flags = _flags(control_plane.api_server(plane))
    assert flags["authorization-mode"] == "Node,RBAC"
    assert set(flags["enable-admission-plugins"].split(",")) == {
        "NodeRestriction",
        "ServiceAccount",
        "PodSecurity",
    }
    assert flags["kubelet-certificate-authority"] == str(plane.layout.pki / "ca.crt")


def test_controllers_act_under_their_own_accounts(plane: ControlPlane) -> None:
    flags = _flags(control_plane.controller_manager(plane))
    assert flags["use-service-account-credentials"] == "true"


def test_kwok_leaves_real_nodes_alone(plane: ControlPlane) -> None:
    flags = _flags(control_plane.kwok(plane))
    labels = fake_nodes.build_node("n", gpus=8, cpus=1, memory_gib=1, tainted=True)["metadata"]
    assert flags["manage-nodes-with-label-selector"] == "type=kwok"
    assert isinstance(labels, dict)
    assert labels["labels"]["type"] == "kwok"


def test_the_kubelet_asks_the_api_server_who_may_call_it(plane: ControlPlane) -> None:
    node.kubelet(plane)
    config = json.loads((plane.layout.etc / "kubelet.json").read_text())
    assert config["authentication"]["anonymous"] == {"enabled": False}
    assert config["authorization"] == {"mode": "Webhook"}


def test_containerd_keeps_to_its_own_folders(plane: ControlPlane) -> None:
    config = tomllib.loads(containerd.config_text(plane.layout))
    root = str(plane.layout.root)
    assert config["root"].startswith(root)
    assert config["state"].startswith(root)
    assert config["grpc"]["address"].startswith(root)
    assert config["plugins"]["io.containerd.grpc.v1.cri"]["restrict_oom_score_adj"] is True


def test_dns_answers_for_the_cluster_where_no_name_server_is_known(
    plane: ControlPlane,
) -> None:
    node.dns(plane)
    text = (plane.layout.etc / "Corefile").read_text()
    assert "kubernetes cluster.local" in text
    assert f"bind {plane.network.node_address}" in text


def test_a_file_that_says_the_same_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("same")
    path.chmod(0o400)
    before = path.stat()
    write_if_changed(path, "same")
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def test_no_identity_but_the_administrators_skips_rbac() -> None:
    identities = certs.identities(addresses=("127.0.0.1",), node="n", node_address="10.0.0.1")
    masters = {one.file for one in identities if one.group == "system:masters"}
    assert masters == {"admin", "to-kubelet", "dns"}


def test_a_certificate_names_its_holder_and_its_hosts(tmp_path: Path) -> None:
    wanted = certs.identities(addresses=("127.0.0.1",), node="n", node_address="10.0.0.1")
    certs.create(tmp_path, wanted)
    text = _openssl_text(tmp_path / "kubelet.crt")
    assert "O = system:nodes, CN = system:node:n" in text
    assert "IP Address:10.0.0.1, DNS:n" in text
    before = (tmp_path / "ca.crt").read_bytes()
    certs.create(tmp_path, wanted)
    assert (tmp_path / "ca.crt").read_bytes() == before


def _openssl_text(path: Path) -> str:

    return run("openssl", "x509", "-noout", "-text", "-in", path)


def test_the_pause_archive_names_its_layer_by_content(tmp_path: Path) -> None:
    (tmp_path / "pause").write_bytes(b"binary")
    pause_image.write_archive(tmp_path / "pause", tmp_path / "pause.tar")
    with tarfile.open(tmp_path / "pause.tar") as archive:
        files = {name: _read(archive, name) for name in archive.getnames()}
    config = json.loads(files["config.json"])
    assert config["rootfs"]["diff_ids"] == [f"sha256:{sha256(files['layer.tar']).hexdigest()}"]
    assert json.loads(files["manifest.json"])[0]["RepoTags"] == [pause_image.NAME]


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None
    return member.read()
