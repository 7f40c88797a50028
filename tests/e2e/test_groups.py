"""One replica over two pods of a real cluster: it answers, and it dies and comes back as one."""

from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import ROOT, Cluster, kill_container

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
EXAMPLES = ROOT / "manifests" / "examples"
SCHEME = "containerd://"
NAME, NAMESPACE = "smollm2-group", "quickstart"
# The model is sure of its answer: where two words are almost equally likely, rounding decides.
QUESTION = "Name the capital of France."


def pods_of(cluster: Cluster) -> list[dict[str, Any]]:
    selector = f"mizzen.dev/deployment={NAME}"
    listed = cluster.get("pods", "-n", NAMESPACE, "-l", selector)["items"]
    return [pod for pod in listed if "deletionTimestamp" not in pod["metadata"]]


def names_of(cluster: Cluster) -> set[str]:
    return {pod["metadata"]["name"] for pod in pods_of(cluster)}


def answer_of(cluster: Cluster, model: str = NAME) -> str:
    reply = httpx.post(
        f"{cluster.gateway}/v1/chat/completions",
        headers={"Authorization": f"Bearer {cluster.api_key}"},
        json={
            "model": model,
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": 24,
        },
        timeout=600,
    )
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"])


def is_follower(pod: dict[str, Any]) -> bool:
    return bool(pod["metadata"]["labels"]["mizzen.dev/rank"] == "1")


def is_ready(resource: dict[str, Any]) -> bool:
    return bool(resource.get("status", {}).get("ready") == "1/1")


def test_two_pods_answer_as_one_and_come_back_as_one(quickstart: Cluster) -> None:
    resource = yaml.safe_load((EXAMPLES / "cpu-two-pods.yaml").read_text())
    quickstart.apply(resource)
    try:
        quickstart.wait_for("llmd", NAME, "-n", NAMESPACE, until=is_ready)
        before = names_of(quickstart)
        assert len(before) == 2
        assert "Paris" in answer_of(quickstart)
        follower = next(pod for pod in pods_of(quickstart) if is_follower(pod))
        kill_container(follower["status"]["containerStatuses"][0]["containerID"][len(SCHEME) :])
        gone = quickstart.wait_for(
            "llmd", NAME, "-n", NAMESPACE, until=lambda found: not is_ready(found)
        )
        assert gone["status"]["readyReplicas"] == 0
        quickstart.wait_for("llmd", NAME, "-n", NAMESPACE, until=is_ready)
        after = names_of(quickstart)
        assert len(after) == 2
        assert not before & after, "no pod of a group comes back alone"
        assert "Paris" in answer_of(quickstart)
    finally:
        quickstart.kubectl("delete", "llmd", NAME, "-n", NAMESPACE)


def test_two_pods_with_half_of_the_layers_each_answer_as_one(quickstart: Cluster) -> None:
    resource = yaml.safe_load((EXAMPLES / "cpu-two-stages.yaml").read_text())
    name = resource["metadata"]["name"]
    quickstart.apply(resource)
    try:
        quickstart.wait_for("llmd", name, "-n", NAMESPACE, until=is_ready)
        assert "Paris" in answer_of(quickstart, name)
    finally:
        quickstart.kubectl("delete", "llmd", name, "-n", NAMESPACE)
