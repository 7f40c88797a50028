"""The API-only cluster plays nodes and pods as a kubelet would, and is gone without a trace."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hack.cluster.api_only import ApiCluster
from hack.cluster.errors import ClusterError

pytestmark = pytest.mark.api
GATE = "mizzen.dev/in-service"


@pytest.fixture(scope="module")
def cluster() -> Iterator[ApiCluster]:
    with ApiCluster() as cluster:
        cluster.add_nodes(1, gpus=8)
        yield cluster


def _pod(name: str, *, gpus: int, gates: list[str]) -> str:
    container = {"name": "c", "image": "none", "resources": {"limits": {"nvidia.com/gpu": gpus}}}
    readiness = [{"conditionType": gate} for gate in gates]
    spec = {"containers": [container], "readinessGates": readiness}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})


def _condition(cluster: ApiCluster, pod: str, kind: str) -> str:
    path = f'jsonpath={{.status.conditions[?(@.type=="{kind}")].status}}'
    return cluster.kubectl("get", "pod", pod, "-o", path)


def test_a_pod_is_ready_when_its_gate_is_and_not_before(cluster: ApiCluster) -> None:
    cluster.kubectl("apply", "-f", "-", stdin=_pod("gated", gpus=1, gates=[GATE]))
    _wait_until(lambda: _condition(cluster, "gated", "ContainersReady") == "True")
    assert _condition(cluster, "gated", "Ready") != "True"
    for status in ("True", "False", "True"):
        patch = json.dumps({"status": {"conditions": [{"type": GATE, "status": status}]}})
        cluster.kubectl("patch", "pod", "gated", "--subresource=status", "-p", patch)
        _wait_until(lambda status=status: _condition(cluster, "gated", "Ready") == status)  # type: ignore[misc]


def test_gpus_run_out(cluster: ApiCluster) -> None:
    for name in ("large", "too-much"):
        cluster.kubectl("apply", "-f", "-", stdin=_pod(name, gpus=4, gates=[]))
    _wait_until(lambda: _condition(cluster, "large", "Ready") == "True")
    _wait_until(lambda: _condition(cluster, "too-much", "PodScheduled") == "False")


def test_rbac_is_enforced(cluster: ApiCluster) -> None:
    stranger = "--as=system:serviceaccount:default:default"
    with pytest.raises(ClusterError, match="cannot list resource"):
        cluster.kubectl("get", "secrets", stranger)


def test_a_stopped_cluster_leaves_neither_process_nor_file(tmp_path: Path) -> None:
    kept = tmp_path / "somebody's"
    kept.write_text("not ours")
    with ApiCluster(tmp_path) as cluster:
        assert cluster.kube.is_ready()
        assert len([line for line in _command_lines() if str(tmp_path) in line]) == 5
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert not [line for line in _command_lines() if str(tmp_path) in line]


def _command_lines() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text(errors="replace"))
        except OSError:
            continue  # ended meanwhile
    return lines


def _wait_until(is_so: Callable[[], bool], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so in time"
        time.sleep(0.2)
