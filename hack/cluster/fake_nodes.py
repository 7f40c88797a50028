"""Nodes that only exist in the API, played by kwok: a fleet of GPUs that costs no GPU."""

from hack.cluster.kubeapi import KubeApi

# Real pods stay away unless they say that they may run nowhere.
TAINT = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
GPU = "nvidia.com/gpu"


def build_node(
    name: str, *, gpus: int, cpus: int, memory_gib: int, tainted: bool
) -> dict[str, object]:
    """Return the manifest of a fake node."""
    capacity = {"cpu": str(cpus), "memory": f"{memory_gib}Gi", "pods": "110"}
    if gpus:
        capacity[GPU] = str(gpus)
    labels = {"type": "kwok", "kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"taints": [TAINT] if tainted else []},
        "status": {"capacity": capacity, "allocatable": capacity},
    }


def add_nodes(
    kube: KubeApi, names: list[str], *, gpus: int, cpus: int, memory_gib: int, tainted: bool
) -> None:
    """Create fake nodes; those that are there stay as they are."""
    for name in names:
        node = build_node(name, gpus=gpus, cpus=cpus, memory_gib=memory_gib, tainted=tainted)
        kube.create("/api/v1/nodes", node)


def set_fake_gpus(kube: KubeApi, node: str, count: int) -> None:
    """Give a real node GPUs in name only: scheduler and kubelet count them, no device is there."""
    operations = [
        {"op": "add", "path": f"/status/{field}/{GPU.replace('/', '~1')}", "value": str(count)}
        for field in ("capacity", "allocatable")
    ]
    kube.patch(f"/api/v1/nodes/{node}/status", operations)
