"""Trainer pods and job.json: what the operator builds, the trainer's own settings model reads."""

from dataclasses import replace
from typing import Any

import pytest

from mizzen.operator.controllers.job_lending import request_of
from mizzen.operator.crds.finetunejob import FineTuneJobSpec
from mizzen.operator.desired.jobs import (
    Worker,
    artifact_uri,
    build_config_map,
    build_trainer_pod,
)
from mizzen.operator.desired.train_config import Job, build_train_config
from mizzen.operator.desired.workers import build_workers_policy, build_workers_service
from mizzen.runtime.train.config import TrainConfig, TrainerEnvironment

GPU = {"accelerator": {"resource": "example.com/gpu"}}
ALONE = Worker(generation=1, workers=1)


def job(**changes: Any) -> Job:
    spec: dict[str, Any] = {
        "baseModel": {"source": "pvc://models/smollm2"},
        "dataset": [{"name": "tickets", "uri": "configMap://tickets/data.jsonl"}],
    } | changes
    parsed = FineTuneJobSpec.parse(spec)
    return Job("team", "support", "8c1b2c1e-0000", parsed, "pvc://models/smollm2")


SPECS: dict[str, dict[str, Any]] = {
    "the shortest job": {},
    "a full fine-tune": {"adaptation": {"type": "full"}},
    "a base in 4 bits": {"adaptation": {"type": "qlora", "quantization": "int4"}},
    "the best checkpoint is the result": {"checkpoint": {"keepBest": 2}},
    "a budget": {"budget": {"maxHours": 1.5, "maxTokens": 1000000}},
    "another backend": {"backend": "Transformers"},
    "attention only": {"adaptation": {"targets": "attention"}},
    "a gate that demands better": {
        "evaluation": {"suites": [{"name": "holdout", "maxRegressionRatio": -0.05}]}
    },
    "a gate of many questions that only warns": {
        "evaluation": {
            "onFail": "Warn",
            "suites": [
                {"name": "labels", "type": "classification", "labels": ["yes", "no"]},
                {"name": "words", "type": "exactMatch", "maxNewTokens": 8},
            ],
        }
    },
    "data on a claim and on the web": {
        "dataset": [
            {"name": "a", "uri": "pvc://data/a.jsonl", "weight": 2, "sha256": "a" * 64},
            {"name": "b", "uri": "https://data.example/b.jsonl", "format": "messages"},
        ]
    },
    "no clipping": {"hyperparameters": {"gradClip": 0, "maxSteps": 10, "microBatch": 1}},
    "the largest seed": {"hyperparameters": {"seed": 4294967295}},
    "a preference with its settings": {
        "method": "dpo",
        "dpo": {"beta": 0.2, "labelSmoothing": 0.1},
        "evaluation": {"suites": [{"name": "votes", "type": "preferenceLoss"}]},
    },
    "a reward model": {"method": "reward"},
    "a teacher on another claim": {
        "method": "distill",
        "distill": {"teacher": "pvc://teachers/large", "samples": 16, "dataWeight": 0.2},
    },
    "adapters merged without data": {
        "method": "merge",
        "merge": {"kind": "adapter", "parts": [{"source": "pvc://models/a"}]},
        "dataset": [],
    },
    "an average of models": {
        "method": "merge",
        "merge": {
            "kind": "average",
            "baseWeight": 2,
            "parts": [{"source": "file:///models/b", "weight": 0.5}],
        },
    },
    "four bits": {
        "method": "quantize",
        "quantize": {"scheme": "int4", "groupSize": 32, "algorithm": "gptq"},
    },
    "fewer layers": {"method": "prune", "prune": {"kind": "depth", "ratio": 0.5}},
    "rewards by rule": {
        "method": "grpo",
        "rl": {
            "groupSize": 4,
            "maxNewTokens": 16,
            "rewards": [
                {"type": "regex", "pattern": "^yes", "weight": 2},
                {"type": "length", "tokens": 8},
                {"type": "exactAnswer"},
            ],
        },
        "evaluation": {"suites": [{"name": "worth", "type": "reward"}]},
    },
    "a reward model on another claim": {
        "method": "ppo",
        "rl": {"rewardModel": "pvc://rewards/a", "gaeLambda": 0.9, "whitenRewards": False},
        "roles": "Ray",
    },
    "a patient watchdog": {"failure": {"hangTimeoutSeconds": 7200}},
    "results elsewhere": {"output": {"uri": "pvc://results/x"}},
}


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_the_trainer_reads_what_the_operator_writes(changes: dict[str, Any]) -> None:
    written = build_train_config(job(**changes), generation=3, workers=1)
    assert TrainConfig.model_validate(written).generation == 3


def test_results_go_beside_the_base_model_by_default() -> None:
    assert job().output_uri == "pvc://models/adapters/support"
    assert job(adaptation={"type": "full"}).output_uri == "pvc://models/models/support"


def test_what_is_computed_is_a_model_and_every_address_in_it_is_mounted() -> None:
    parts = [{"source": "pvc://adapters/a"}, {"source": "file:///models/b"}]
    merging = job(method="merge", merge={"kind": "adapter", "parts": parts}, dataset=[])
    assert merging.output_uri == "pvc://models/models/support"
    assert merging.claims == ("adapters", "models")
    written = build_train_config(merging, generation=1, workers=1)
    assert [part["source"] for part in written["merge"]["parts"]] == [
        "/mnt/pvc/adapters/a",
        "/models/b",
    ]


def test_every_source_is_mounted_once() -> None:
    mounted = job(
        dataset=[
            {"name": "a", "uri": "pvc://models/a.jsonl"},
            {"name": "b", "uri": "pvc://data/b.jsonl"},
            {"name": "c", "uri": "configMap://c.with.dots/d"},
        ]
    )
    pod = build_trainer_pod(mounted, ALONE, image="r:1", pull_policy="IfNotPresent")
    paths = [m["mountPath"] for m in pod["spec"]["containers"][0]["volumeMounts"]]
    assert len(paths) == len(set(paths))
    assert {"/mnt/pvc/models", "/mnt/pvc/data", "/mnt/configmap/c.with.dots"} <= set(paths)
    names = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {m["name"] for m in pod["spec"]["containers"][0]["volumeMounts"]} == names


def test_a_pod_remembers_the_crashes_before_it() -> None:
    pod = build_trainer_pod(
        job(),
        Worker(generation=4, workers=1, crashes=2),
        image="r:1",
        pull_policy="Always",
    )
    assert pod["metadata"]["name"] == "support-g4-0"
    assert pod["metadata"]["annotations"]["mizzen.dev/restarts"] == "2"
    assert pod["spec"]["volumes"][0] == {"name": "job", "configMap": {"name": "support-g4"}}


def test_workers_are_told_where_their_leader_is(monkeypatch: pytest.MonkeyPatch) -> None:
    group = job(workers={"min": 2, "max": 3})
    worker = Worker(generation=2, workers=3, rank=1)
    pod = build_trainer_pod(group, worker, image="r:1", pull_policy="Always")
    for variable in pod["spec"]["containers"][0]["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    told = TrainerEnvironment()
    leader = build_trainer_pod(
        group, Worker(generation=2, workers=3), image="r:1", pull_policy="Always"
    )
    service = build_workers_service(group)
    name, subdomain = leader["spec"]["hostname"], leader["spec"]["subdomain"]
    assert subdomain == service["metadata"]["name"]
    assert (told.node_rank, told.master_addr) == (1, f"{name}.{subdomain}.team.svc")
    assert told.master_port == service["spec"]["ports"][0]["port"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


def test_workers_are_told_how_many_of_them_share_a_copy() -> None:
    pairs = job(workers={"min": 2, "max": 4}, parallelism={"tensor": 2})
    told = build_train_config(pairs, generation=1, workers=4)
    assert (told["workers"], told["parallelism"]) == (4, {"tensor": 2})
    pod = build_trainer_pod(
        pairs, Worker(generation=1, workers=4, rank=3), image="r:1", pull_policy="Always"
    )
    assert pod["metadata"]["annotations"]["mizzen.dev/tensor"] == "2"


def test_workers_may_reach_each_other_and_a_lone_trainer_needs_no_name() -> None:
    policy = build_workers_policy(job(workers={"max": 2}))
    source = policy["spec"]["ingress"][0]["from"][0]["podSelector"]
    assert source == policy["spec"]["podSelector"]
    lone = build_trainer_pod(job(), ALONE, image="r:1", pull_policy="Always")
    assert "subdomain" not in lone["spec"]
    assert [port["name"] for port in lone["spec"]["containers"][0]["ports"]] == ["admin"]


def test_trainer_pods_carry_no_credentials_of_the_api() -> None:
    pod = build_trainer_pod(job(), ALONE, image="r:1", pull_policy="Always")
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["restartPolicy"] == "Never"


def test_gpus_are_requested_as_limits() -> None:
    gpu = job(resources={"accelerator": {"resource": "nvidia.com/gpu", "count": 2}})
    pod = build_trainer_pod(gpu, ALONE, image="r:1", pull_policy="Always")
    limits = pod["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": "2"}


def test_a_generation_is_immutable_and_owned() -> None:
    config_map = build_config_map(job(), 2, workers=1)
    assert config_map["immutable"] is True
    assert config_map["metadata"]["ownerReferences"][0]["name"] == "support"


def test_an_artifact_is_found_by_its_claim() -> None:
    assert artifact_uri("/mnt/pvc/models/adapters/s/0123") == "pvc://models/adapters/s/0123"


def test_a_trainer_is_told_who_judges_and_given_the_key_for_it() -> None:
    evaluation = {
        "judge": {"deployment": "big", "apiKeySecret": "trainer"},
        "suites": [{"name": "liked", "type": "winRate"}],
    }
    judged = replace(
        job(evaluation=evaluation), judge={"url": "http://gateway", "model": "org/big"}
    )
    told = TrainConfig.model_validate(build_train_config(judged, 1, 1)).evaluation.judge
    assert told is not None and (told.url, told.model) == ("http://gateway", "org/big")
    pod = build_trainer_pod(judged, ALONE, image="runtime:1", pull_policy="Always")
    (variable,) = pod["spec"]["containers"][0]["env"]
    assert variable["name"] == "MIZZEN_JUDGE_API_KEY"
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "trainer", "key": "api-key"}}


def test_copies_are_written_to_a_claim_that_is_mounted_and_to_a_bucket() -> None:
    copied = job(output={"ociLayout": "pvc://registry/layout", "s3": "s3://models/adapters"})
    told = TrainConfig.model_validate(build_train_config(copied, 1, 1)).output
    assert str(told.oci_layout) == "/mnt/pvc/registry/layout"
    assert told.s3 == "s3://models/adapters"
    assert str(told.directory) == "/mnt/pvc/models/adapters/support"
    assert copied.claims == ("models", "registry")
    assert artifact_uri("/mnt/pvc/registry/layout@sha256:ab") == "pvc://registry/layout@sha256:ab"
    assert artifact_uri("s3://models/adapters/ab") == "s3://models/adapters/ab"


def test_the_trainer_is_told_what_prepares_its_data() -> None:
    large = job(processing={"engine": "Ray"})
    assert TrainConfig.model_validate(build_train_config(large, 1, 1)).processing.engine == "Ray"


def test_feedback_is_read_from_its_deployments_folder_until_the_job_was_made() -> None:
    said = {"name": "said", "feedbackRef": {"deployment": "chat", "folder": "pvc://logs/said"}}
    learner = replace(job(dataset=[said]), created_at="2026-01-01T00:00:00Z")
    (dataset,) = TrainConfig.model_validate(build_train_config(learner, 1, 1)).datasets
    assert str(dataset.feedback) == "/mnt/pvc/logs/said/chat"
    assert dataset.until == "2026-01-01T00:00:00Z"
    assert learner.claims == ("logs", "models")


def test_a_trainer_is_told_which_deployment_teaches_and_given_the_key_for_it() -> None:
    distill = {"deployment": "big", "apiKeySecret": "teachers", "onPolicy": True}
    taught = replace(
        job(method="distill", distill=distill),
        teacher={"url": "http://gateway", "model": "org/big"},
    )
    told = TrainConfig.model_validate(build_train_config(taught, 1, 1)).distill
    assert told is not None and told.served is not None and told.on_policy
    assert (told.served.url, told.served.model) == ("http://gateway", "org/big")
    pod = build_trainer_pod(taught, ALONE, image="runtime:1", pull_policy="Always")
    (variable,) = pod["spec"]["containers"][0]["env"]
    assert variable["name"] == "MIZZEN_TEACHER_API_KEY"
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "teachers", "key": "api-key"}}


def test_a_trainer_is_told_where_the_replicas_are_that_draw_for_it() -> None:
    rl = {"rewards": [{"type": "exactAnswer"}], "rollout": {"deployment": "chat"}}
    drawing = replace(job(method="grpo", rl=rl), rollout={"url": "http://chat.team.svc:8000"})
    told = TrainConfig.model_validate(build_train_config(drawing, 1, 1)).rl
    assert told is not None and told.rollout is not None
    assert told.rollout.url == "http://chat.team.svc:8000"


def test_a_queue_s_pods_are_one_group_to_kueue_and_nothing_is_asked_of_our_arbiter() -> None:
    queued = job(queue="research", workers={"max": 2}, resources=GPU)
    for rank in (0, 1):
        worker = Worker(generation=3, workers=2, rank=rank)
        pod = build_trainer_pod(queued, worker, image="r:1", pull_policy="Never")
        metadata = pod["metadata"]
        assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "research"
        assert metadata["labels"]["kueue.x-k8s.io/pod-group-name"] == "support-g3"
        assert metadata["annotations"]["kueue.x-k8s.io/pod-group-total-count"] == "2"
        assert metadata["annotations"]["kueue.x-k8s.io/retriable-in-group"] == "false"
        assert pod["spec"]["schedulingGates"] == [{"name": "kueue.x-k8s.io/admission"}]
    resource = {"metadata": {"creationTimestamp": "2026-09-01T12:00:00Z"}}
    assert request_of(resource, queued, made=[]) is None
    ours = request_of(resource, job(workers={"max": 2}, resources=GPU), made=[])
    assert ours is not None and (ours.job.gang.pods, ours.job.gang.devices) == (2, 1)
