"""One API server for all tests of this folder; each test gets a namespace of its own."""

from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import pytest

from hack.cluster.api_only import ApiCluster
from hack.prometheus import NoPrometheusError, prometheus_binary
from tests.fixtures.job_scene import Scene, open_scene

CRDS = "manifests/crds"
_numbers = count(1)


@pytest.fixture(scope="session")
def cluster() -> Iterator[ApiCluster]:
    """A real control plane with simulated nodes of 8 GPUs each, our CRDs installed."""
    with ApiCluster() as running:
        running.add_nodes(4, gpus=8)
        running.kubectl("apply", "--server-side", "-f", CRDS)
        running.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=300s")
        yield running


@pytest.fixture
def namespace(cluster: ApiCluster) -> Iterator[str]:
    """A fresh namespace, gone after the test."""
    name = f"test-{next(_numbers)}"
    cluster.kubectl("create", "namespace", name)
    cluster.wait_for_service_account(name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
async def scene(cluster: ApiCluster, namespace: str, tmp_path: Path) -> AsyncIterator[Scene]:
    """One job in a namespace of its own, looked at as often as a test says."""
    async with open_scene(cluster, namespace, tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def prometheus() -> Path:
    """Return the path of a Prometheus server's binary."""
    try:
        return prometheus_binary()
    except NoPrometheusError as error:
        pytest.skip(f"no Prometheus to ask: {error}")
