"""Bad input gets an answer that says what to change, and costs nobody else anything."""

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from openai import APIStatusError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]
NAMESPACE = "bad-input"
WITH_CLAIM = "quickstart"  # has the claim `models` and serves smollm2 from it
Json = dict[str, Any]

QUESTION = {"role": "user", "content": "Which port is this?"}
ANSWER = {"role": "assistant", "content": "Hamburg."}
GOOD_LINE = json.dumps({"messages": [QUESTION, ANSWER]})
DATASETS = {
    "not-json": (
        "\n".join([*[GOOD_LINE] * 6, '{"messages": [', GOOD_LINE]), "DatasetNotJson", "line 7 is"
    ),
    "empty": ("", "DatasetEmpty", "holds no sample"),
    "nobody-answers": (
        "\n".join([json.dumps({"messages": [QUESTION]})] * 8),
        "DatasetNoAssistantTurns", "none of its 8 samples has an assistant turn",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster(quickstart: Cluster) -> Iterator[Cluster]:
    metadata = {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
    quickstart.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    yield quickstart
    quickstart.kubectl("delete", "namespace", NAMESPACE, "--timeout=180s")


@pytest.fixture
def client(cluster: Cluster) -> OpenAI:
    return OpenAI(base_url=f"{cluster.gateway}/v1", api_key=cluster.api_key, max_retries=0)


def deployment(name: str, source: str, *, namespace: str = NAMESPACE, **spec: Any) -> Json:
    return {
        "apiVersion": "mizzen.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"model": {"source": source, "maxModelLen": 256}, **spec},
    }


def ready(resource: Json) -> Json:
    conditions: list[Json] = resource.get("status", {}).get("conditions", [])
    return next((entry for entry in conditions if entry["type"] == "Ready"), {})


def wait_for_reason(
    cluster: Cluster, name: str, reason: str, *, kind: str = "llmd", namespace: str = NAMESPACE
) -> str:
    """Return the message beside the reason, once `Ready` gives it."""
    found = cluster.wait_for(
        kind, name, "-n", namespace, until=lambda resource: ready(resource).get("reason") == reason
    )
    assert ready(found)["status"] == "False"
    message: str = ready(found)["message"]
    return message


def test_a_model_path_that_does_not_exist_is_named_and_a_corrected_one_serves(
    cluster: Cluster,
) -> None:
    cluster.apply(deployment("lost", "pvc://models/smollm3", namespace=WITH_CLAIM))
    message = wait_for_reason(cluster, "lost", "ModelNotFound", namespace=WITH_CLAIM)
    assert "no file or directory /mnt/pvc/models/smollm3" in message
    cluster.apply(deployment("lost", "pvc://models/smollm2", namespace=WITH_CLAIM))
    cluster.wait_for(
        "llmd", "lost", "-n", WITH_CLAIM, until=lambda llmd: ready(llmd).get("status") == "True"
    )
    cluster.kubectl("delete", "llmd", "lost", "-n", WITH_CLAIM)


def test_an_image_that_cannot_be_pulled_is_named(cluster: Cluster) -> None:
    image = "127.0.0.1:5000/mizzen/nothing:1"
    cluster.apply(deployment("no-image", "file:///models/any", engine={"image": image}))
    assert f"The image {image} cannot be pulled" in wait_for_reason(
        cluster, "no-image", "ImagePullFailed"
    )


def test_a_claim_that_is_missing_is_named(cluster: Cluster) -> None:
    cluster.apply(deployment("no-claim", "pvc://atlantis/model"))
    assert f"no PersistentVolumeClaim atlantis in namespace {NAMESPACE}" in wait_for_reason(
        cluster, "no-claim", "ClaimNotFound"
    )


def test_more_gpus_than_any_node_has_waits_without_flapping(cluster: Cluster) -> None:
    wanted = {"resource": "nvidia.com/gpu", "count": 64}
    cluster.apply(deployment("too-large", "file:///models/any", accelerator=wanted))
    message = wait_for_reason(cluster, "too-large", "MoreDevicesThanAnyNode")
    assert message.startswith("A pod asks for 64 nvidia.com/gpu and ")

    def state() -> tuple[Json, list[tuple[str, str]]]:
        pods = cluster.get(
            "pods", "-n", NAMESPACE, "-l", "mizzen.dev/deployment=too-large"
        )["items"]  # fmt: skip
        versions = [(pod["metadata"]["uid"], pod["metadata"]["resourceVersion"]) for pod in pods]
        return cluster.get("llmd", "too-large", "-n", NAMESPACE)["status"], versions

    before = state()
    while (time.sleep(5) or state()) != before:  # what the scheduler makes of it comes later
        before = state()
    assert len(before[1]) == 1
    time.sleep(20)
    assert state() == before


def test_unknown_fields_are_refused(cluster: Cluster) -> None:
    with pytest.raises(AssertionError, match=r'unknown field "(spec\.)?replica"'):
        cluster.apply(deployment("typing-error", "pvc://models/smollm2", replica=2))


def test_replicas_beside_scaling_are_refused(cluster: Cluster) -> None:
    both = {"replicas": 1, "scaling": {"min": 1, "max": 2}}
    with pytest.raises(AssertionError, match="Set replicas for a fixed size or scaling for bounds"):
        cluster.apply(deployment("both", "pvc://models/smollm2", **both))


@pytest.mark.parametrize(("data", "reason", "words"), DATASETS.values(), ids=DATASETS)
def test_a_job_says_what_is_wrong_with_its_data(
    cluster: Cluster, request: pytest.FixtureRequest, data: str, reason: str, words: str
) -> None:
    name = f"bad-data-{request.node.callspec.id}"
    metadata = {"name": name, "namespace": WITH_CLAIM}
    cluster.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"d.jsonl": data}},
        {
            "apiVersion": "mizzen.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata,
            "spec": {
                "method": "sft",
                "baseModel": {"deployment": "smollm2"},
                "dataset": [{"name": "talks", "uri": f"configMap://{name}/d.jsonl"}],
            },
        },
    )  # fmt: skip
    message = wait_for_reason(cluster, name, reason, kind="ftj", namespace=WITH_CLAIM)
    assert message.startswith("dataset talks: ")
    assert words in message
    assert cluster.get("ftj", name, "-n", WITH_CLAIM)["status"]["phase"] == "Failed"
    cluster.kubectl("delete", f"ftj/{name}", f"configmap/{name}", "-n", WITH_CLAIM)


def refusal(client: OpenAI, **changed: Any) -> tuple[int, Json]:
    """Return status and error of a chat request that differs from a good one."""
    good = {"model": "smollm2", "messages": [QUESTION]}
    with pytest.raises(APIStatusError) as caught:
        client.chat.completions.create(**{**good, **changed})
    assert isinstance(caught.value.body, dict)
    return caught.value.status_code, caught.value.body


def test_a_prompt_over_the_context_length_is_told_both_lengths(
    cluster: Cluster, client: OpenAI
) -> None:
    limit = cluster.get("llmd", "smollm2", "-n", WITH_CLAIM)["spec"]["model"]["maxModelLen"]
    long = {"role": "user", "content": "ship " * 2 * limit}
    status, error = refusal(client, messages=[long])
    assert (status, error["code"]) == (400, "context_length_exceeded")
    found = re.match(r"The prompt has (\d+) tokens and the context holds (\d+)", error["message"])
    assert found is not None
    assert int(found[1]) > 2 * limit
    assert int(found[2]) == limit


def test_negative_max_tokens_are_refused_by_name(client: OpenAI) -> None:
    status, error = refusal(client, max_tokens=-5)
    assert (status, error["param"]) == (400, "max_tokens")


def test_a_body_of_50_mb_is_refused(client: OpenAI) -> None:
    large = {"role": "user", "content": "x" * 50_000_000}
    status, error = refusal(client, messages=[large])
    assert (status, error["code"]) == (413, "request_too_large")


def test_an_unknown_model_is_refused_by_name(client: OpenAI) -> None:
    status, error = refusal(client, model="atlantis")
    assert (status, error["code"]) == (404, "model_not_found")
    assert "atlantis" in error["message"]


def addresses(cluster: Cluster) -> list[str]:
    """Return where the replicas of smollm2 are."""
    pods = cluster.get("pods", "-n", WITH_CLAIM, "-l", "mizzen.dev/deployment=smollm2")["items"]
    return [pod["status"]["podIP"] for pod in pods]


def total(replicas: list[str], metric: str) -> float:
    """Return a metric's sum over replicas, from their own ports."""
    value = 0.0
    for address in replicas:
        with urllib.request.urlopen(f"http://{address}:8002/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
            samples = [sample for family in families for sample in family.samples]
        value += sum(sample.value for sample in samples if sample.name == metric)
    return value


def test_a_client_that_leaves_in_mid_stream_frees_its_place(
    cluster: Cluster, client: OpenAI
) -> None:
    replicas, wanted = addresses(cluster), 900  # looked up before: every second is many tokens
    made_before = total(replicas, "vllm:generation_tokens_total")
    free_before = total(replicas, "mizzen:kv_blocks_free")
    stream = client.chat.completions.create(
        model="smollm2", messages=[QUESTION], max_tokens=wanted, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    # The first chunk has a role and no text.
    told = (chunk for chunk in stream if chunk.choices[0].delta.content)
    for _ in range(3):
        next(told)
    assert total(replicas, "vllm:num_requests_running") == 1
    stream.close()
    while total(replicas, "vllm:num_requests_running"):
        time.sleep(0.1)
    assert total(replicas, "mizzen:kv_blocks_free") == free_before
    # It ended because the client was gone, not because the answer was complete.
    made = total(replicas, "vllm:generation_tokens_total") - made_before
    assert 3 <= made < wanted
