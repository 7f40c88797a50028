"""What the API server makes of our resources: defaults, refusals, columns, scale, selectors."""

import json

import pytest

from hack.cluster.api_only import ApiCluster
from hack.cluster.errors import ClusterError
from tests.fixtures.custom_resources import GPU, OFFICE, apply, deployment, job

pytestmark = pytest.mark.api


def test_the_shortest_deployment_gets_every_default(cluster: ApiCluster, namespace: str) -> None:
    spec = apply(cluster, namespace, deployment())["spec"]
    assert spec == {
        "model": {"source": "pvc://models/smollm2", "dtype": "auto"},
        "accelerator": {"resource": "none"},
        "parallelism": {"tensor": 1, "pipeline": 1, "nodes": 1},
        "drain": {"maxSeconds": 120},
        "rollout": {
            "strategy": "Rolling",
            "maxSurge": 1,
            "maxUnavailable": 0,
            "paused": False,
            "progressDeadlineSeconds": 3600,
            "revisionHistoryLimit": 10,
        },
    }


FETCHED = [
    "hf://org/Name-1.5_b",
    "hf://org/name@v1.0",
    "hf://org/name@refs%2Fpr%2F1/q4.gguf",
    "s3://models.team-a/a/b/",
    "s3://models/one.gguf",
]


@pytest.mark.parametrize("source", FETCHED)
def test_a_model_that_is_fetched_is_accepted(
    cluster: ApiCluster, namespace: str, source: str
) -> None:
    model = {
        "source": source,
        "credentials": {"name": "keys"},
        "cache": {"claim": "node-models", "maxGiB": 0.5},
    }
    written = apply(cluster, namespace, deployment(model=model), "--dry-run=server")
    assert written["spec"]["model"] == model | {"dtype": "auto"}


def test_the_example_of_every_field_is_accepted(cluster: ApiCluster, namespace: str) -> None:
    patch = {
        "labels": {"team": "chat"},
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone"}],
        "env": [
            {"name": "A", "value": "1"},
            {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        ],
        "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "10Gi"}}],
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
        "resources": {"requests": {"cpu": 2, "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
        "imagePullSecrets": [{"name": "registry"}],
        "runtimeClassName": "nvidia",
        "priorityClassName": "serving",
    }
    full = deployment(
        model={
            "source": "file:///models/m.gguf",
            "servedName": "org/Model-1.5",
            "maxModelLen": 4096,
            "dtype": "bfloat16",
        },
        scaling={
            "min": 0,
            "max": 4,
            "slo": {"ttftMs": 1000, "itlMs": 100, "attainment": 0.95},
            "targets": {"concurrency": 16, "queue": 2, "kvUsedRatio": 0.8},
            "idle": {"toZeroAfterSeconds": 600},
            "schedules": [
                {**OFFICE, "timezone": "Europe/Berlin"},
                {
                    **OFFICE,
                    "name": "night",
                    "start": "18:00",
                    "end": "24:00",
                    "timezone": "Europe/Berlin",
                    "min": 0,
                },
            ],
            "fallback": {"replicas": 2, "afterSeconds": 300},
            "budget": {"gpus": 12},
        },
        accelerator={**GPU, "count": 2},
        parallelism={"tensor": 2, "pipeline": 2, "nodes": 2},
        adapters=[{"name": "support.v2", "source": "pvc://models/adapters/support"}],
        engine={
            "image": "example/runtime:1",
            "maxNumSeqs": 8,
            "maxNumBatchedTokens": 512,
            "kvCacheGiB": 0.5,
        },
        prompts=[
            {"id": "translate", "messages": [{"role": "system", "content": "To {{language}}."}]}
        ],
        guardrails=[
            {"name": "keys", "stage": "Input", "deny": ["sk-[a-z]+"], "action": "Redact"},
            {"name": "brief", "stage": "Output", "maxChars": 9000, "onError": "Allow"},
        ],
        podTemplatePatch=patch,
    )
    assert apply(cluster, namespace, full)["spec"]["podTemplatePatch"] == patch
    reports_only = deployment(replicas=2, scaling={"max": 4, "dryRun": True})
    assert apply(cluster, namespace, reports_only)["spec"]["scaling"]["dryRun"] is True


MAY_CHANGE = r"\(only suspend, workers, parallelism, spareCapacity and priority can\)"


def test_a_job_cannot_change_but_for_what_the_refusal_names(
    cluster: ApiCluster, namespace: str
) -> None:
    changed: dict[str, object] = {"resources": {"accelerator": GPU}}
    apply(cluster, namespace, job(**changed))
    may_change = {
        "suspend": True,
        "workers": {"min": 2, "max": 4},
        "parallelism": {"tensor": 2},
        "spareCapacity": {"enabled": True, "yieldWithinSeconds": 90},
        "priority": 7,
    }
    for field, value in may_change.items():
        changed[field] = value
        written = apply(cluster, namespace, job(**changed))["spec"][field]
        assert written == (written | value if isinstance(value, dict) else value)
    refused = {
        "spec.hyperparameters": {"hyperparameters": {"epochs": 2}},
        "spec.roles": {"roles": "Ray"},
        "spec.output": {"output": {"uri": "pvc://models/elsewhere"}},
        "merge, quantize, prune, rl": {"rl": {"rewards": [{"type": "exactAnswer"}]}},
    }
    for what, fields in refused.items():
        with pytest.raises(ClusterError, match=f"{what} cannot change {MAY_CHANGE}") as refusal:
            apply(cluster, namespace, job(**changed | fields))
        assert "no such key" not in str(refusal.value)


def test_kubectl_scale_and_the_scale_subresource(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, namespace, deployment())
    cluster.kubectl("scale", "-n", namespace, "llmd/smollm2", "--replicas=3")
    path = f"/apis/mizzen.dev/v1alpha1/namespaces/{namespace}/llmdeployments/smollm2/scale"
    scale = json.loads(cluster.kubectl("get", "--raw", path))
    assert scale["spec"]["replicas"] == 3


def test_status_and_spec_are_written_apart(cluster: ApiCluster, namespace: str) -> None:
    made = apply(cluster, namespace, {**deployment(), "status": {"phase": "Ready"}})
    assert "status" not in made
    cluster.kubectl(
        "patch", "-n", namespace, "llmd/smollm2", "--subresource=status", "--type=merge",
        "-p", json.dumps({"status": {"phase": "Ready", "selector": "a=b", "replicas": 2}}),
    )  # fmt: skip
    shown = cluster.kubectl("get", "-n", namespace, "llmd", "smollm2", "-o", "json")
    after = json.loads(shown)
    assert after["status"]["phase"] == "Ready"
    assert after["metadata"]["generation"] == made["metadata"]["generation"]


def test_kubectl_get_llm_lists_both_kinds_with_their_columns(
    cluster: ApiCluster, namespace: str
) -> None:
    apply(cluster, namespace, deployment())
    apply(cluster, namespace, job())
    table = cluster.kubectl("get", "-n", namespace, "llm")
    heads = [line.split() for line in table.splitlines() if line.startswith("NAME")]
    assert heads == [
        ["NAME", "METHOD", "BASE", "PHASE", "STEP", "LOSS", "ETA", "RESTARTS", "PREEMPTED", "AGE"],
        ["NAME", "MODEL", "READY", "STATE", "GPUS", "URL", "AGE"],
    ]


def test_jobs_are_found_by_what_they_promote_to(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, namespace, job(promotion={"deployment": "smollm2"}))
    for target, expected in (("smollm2", "finetunejob.mizzen.dev/support\n"), ("other", "")):
        selector = f"--field-selector=spec.promotion.deployment={target}"
        assert cluster.kubectl("get", "-n", namespace, "ftj", "-o", "name", selector) == expected


def test_kubectl_explain_reads_like_documentation(cluster: ApiCluster) -> None:
    text = cluster.kubectl("explain", "llmdeployment.spec.drain.maxSeconds")
    assert "How long a leaving replica may take to finish its requests." in text
