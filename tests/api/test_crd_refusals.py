"""What the API server refuses in our resources, and what it says to change."""

import pytest

from hack.cluster.api_only import ApiCluster
from hack.cluster.errors import ClusterError
from tests.fixtures.custom_resources import GPU, OFFICE, Document, apply, deployment, job

pytestmark = pytest.mark.api


SERVED = {"rewards": [{"type": "exactAnswer"}], "rollout": {"deployment": "chat"}}
LOAN: Document = {"mode": "Loan", "dataset": [{"name": "t", "uri": "pvc://models/t.jsonl"}]}


REFUSED: dict[str, tuple[Document, str]] = {
    "a loan from nobody": (
        job(**LOAN, baseModel={"source": "pvc://models/m"}),
        "mode Loan needs baseModel.deployment, whose replicas lend their weights.",
    ),
    "a loan of whole weights": (
        job(**LOAN, adaptation={"type": "full"}),
        "mode Loan needs method sft, backend Mizzen and adaptation.type lora.",
    ),
    "a loan with devices of its own": (
        job(**LOAN, resources={"accelerator": GPU}),
        "mode Loan has no pods: leave out workers, resources, spareCapacity, queue and",
    ),
    "a loan on several workers": (
        job(**LOAN, workers={"max": 2}),
        "mode Loan has no pods: leave out workers",
    ),
    "a loan with a judge": (
        job(**LOAN, evaluation={"suites": [{"name": "wins", "type": "winRate"}],
                                "judge": {"deployment": "other"}}),
        "mode Loan cannot ask evaluation.judge: take other suites.",
    ),
    "a loan that uploads": (
        job(**LOAN, output={"s3": "s3://bucket/results"}),
        "mode Loan has no keys of a bucket: leave output.s3 out.",
    ),
    "a loan with data in a ConfigMap": (
        job(mode="Loan"),
        "mode Loan reads no ConfigMap: put each dataset on the claim of the model.",
    ),
    "replicas together with scaling": (
        deployment(replicas=2, scaling={"min": 1, "max": 2}),
        "Set replicas for a fixed size or scaling for bounds, not both; scaling.dryRun true",
    ),
    "none allowed without saying when": (
        deployment(scaling={"min": 0, "max": 2}),
        "scaling.min 0 needs scaling.idle.toZeroAfterSeconds",
    ),
    "none allowed outside a schedule without saying when": (
        deployment(scaling={"min": 0, "max": 4, "schedules": [OFFICE]}),
        "scaling.min 0 needs scaling.idle.toZeroAfterSeconds, which says when to run none.",
    ),
    "none allowed by a schedule without saying when": (
        deployment(scaling={"min": 1, "max": 4, "schedules": [{**OFFICE, "min": 0}]}),
        "So does a schedule's min 0.",
    ),
    "a time to zero where one always runs": (
        deployment(scaling={"min": 1, "max": 2, "idle": {"toZeroAfterSeconds": 60}}),
        "scaling.idle needs scaling.min 0",
    ),
    "a fallback above the maximum": (
        deployment(scaling={"max": 2, "fallback": {"replicas": 3}}),
        "scaling.fallback.replicas must not be larger than scaling.max.",
    ),
    "targets without a target": (
        deployment(scaling={"max": 2, "targets": {}}),
        "Set at least one of targets.concurrency, targets.queue and targets.kvUsedRatio.",
    ),
    "schedules that overlap": (
        deployment(scaling={"max": 2, "schedules": [
            OFFICE, {**OFFICE, "name": "late", "days": ["Tue"], "start": "17:59", "end": "24:00"},
        ]}),
        "Two scaling.schedules overlap",
    ),
    "schedules in two time zones": (
        deployment(scaling={"max": 2, "schedules": [
            OFFICE, {**OFFICE, "name": "late", "start": "18:00", "end": "24:00",
                     "timezone": "Europe/Berlin"},
        ]}),
        "All scaling.schedules must have the same timezone",
    ),
    "a schedule that ends before it starts": (
        deployment(scaling={"max": 2, "schedules": [{**OFFICE, "start": "22:00", "end": "06:00"}]}),
        "A schedule's end must be after its start on the same day",
    ),
    "a schedule whose bounds cross": (
        deployment(scaling={"max": 9, "schedules": [{**OFFICE, "min": 3}]}),
        "A schedule's min must not be larger than its max.",
    ),
    "a budget without devices": (
        deployment(scaling={"max": 2, "budget": {"gpus": 4}}),
        "scaling.budget.gpus needs accelerator.resource",
    ),
    "a budget below the minimum": (
        deployment(
            scaling={"min": 3, "max": 4, "budget": {"gpus": 5}},
            accelerator=GPU, parallelism={"tensor": 2},
        ),
        "scaling.budget.gpus is less than what scaling.min replicas (at least one) hold",
    ),
    "a lower bound above the upper one": (
        deployment(scaling={"min": 3, "max": 2}),
        "scaling.min must not be larger than scaling.max.",
    ),
    "an unknown field": (deployment(replica=2), 'unknown field "spec.replica"'),
    "no model": ({**deployment(), "spec": {}}, "spec.model: Required value"),
    "a model path of a kind we do not have": (
        deployment(model={"source": "http://example/model"}),
        "must look like pvc://CLAIM/PATH, file:///PATH, hf://ORG/NAME[@REVISION] or s3://BUCKET/",
    ),
    "a repository without its owner": (
        deployment(model={"source": "hf://gpt2"}), "hf://ORG/NAME[@REVISION]",
    ),
    "a bucket without a prefix": (
        deployment(model={"source": "s3://models"}), "s3://BUCKET/PREFIX, without",
    ),
    "credentials for a model on a claim": (
        deployment(model={"source": "pvc://m/a", "credentials": {"name": "hub"}}),
        "model.credentials is only for models that are fetched, from hf:// or s3://.",
    ),
    "a cache for a model on a claim": (
        deployment(model={"source": "pvc://m/a", "cache": {"maxGiB": 5}}),
        "model.cache is only for models that are fetched, from hf:// or s3://.",
    ),
    "a cache on the node's own path": (
        deployment(model={"source": "hf://org/a", "cache": {"hostPath": "/models"}}),
        'unknown field "spec.model.cache.hostPath"',
    ),
    "an adapter from a hub": (
        deployment(adapters=[{"name": "a", "source": "hf://org/a"}]),
        "A model path must look like pvc://CLAIM/PATH or file:///PATH, without '..'.",
    ),
    "a model path that climbs out of its volume": (
        deployment(model={"source": "pvc://models/../other"}),
        "or s3://BUCKET/PREFIX, without '..'.",
    ),
    "more ranks than a replica has devices": (
        deployment(accelerator={**GPU, "count": 1}, parallelism={"tensor": 2}),
        "parallelism.tensor times parallelism.pipeline is larger than the devices of a replica",
    ),
    "more stages than devices": (
        deployment(
            accelerator={**GPU, "count": 1}, parallelism={"tensor": 2, "pipeline": 2, "nodes": 2}
        ),
        "parallelism.tensor times parallelism.pipeline is larger than the devices of a replica",
    ),
    "ranks that do not spread evenly over pods": (
        deployment(parallelism={"tensor": 3, "nodes": 2}),
        "parallelism.tensor times parallelism.pipeline must be a multiple of parallelism.nodes",
    ),
    "a number of devices without their name": (
        deployment(accelerator={"count": 2}),
        "accelerator.count needs accelerator.resource, such as nvidia.com/gpu.",
    ),
    "a guardrail that checks nothing": (
        deployment(guardrails=[{"name": "x", "stage": "Input"}]),
        "A guardrail needs deny or maxChars.",
    ),
    "an answer that is to be redacted": (
        deployment(
            guardrails=[{"name": "x", "stage": "Output", "deny": ["a"], "action": "Redact"}]
        ),
        "Redact is for deny in stage Input; use Refuse.",
    ),
    "a rollout that cannot move": (
        deployment(rollout={"maxSurge": 0, "maxUnavailable": 0}),
        "must not both be 0",
    ),
    "a negative number of replicas": (deployment(replicas=-1), "greater than or equal to 0"),
    "a host path": (
        deployment(podTemplatePatch={"volumes": [{"name": "root", "hostPath": {"path": "/"}}]}),
        'unknown field "spec.podTemplatePatch.volumes[0].hostPath"',
    ),
    "the host's network": (
        deployment(podTemplatePatch={"hostNetwork": True}),
        'unknown field "spec.podTemplatePatch.hostNetwork"',
    ),
    "our own labels": (
        deployment(podTemplatePatch={"labels": {"mizzen.dev/deployment": "other"}}),
        "Keys under mizzen.dev/ and app.kubernetes.io/ are set by Mizzen; use another prefix.",
    ),
    "a name that no service can have": (
        {**deployment(), "metadata": {"name": "smollm2.v1"}},
        "services and pods are named after it",
    ),
    "two adapters of one name": (
        deployment(adapters=[{"name": "a", "source": "pvc://m/a"}] * 2),
        "Duplicate value",
    ),
    "a job with two base models": (
        job(baseModel={"deployment": "smollm2", "source": "pvc://models/smollm2"}),
        "Set exactly one of baseModel.deployment and baseModel.source.",
    ),
    "a job without a base model": (
        job(baseModel={}),
        "Set exactly one of baseModel.deployment and baseModel.source.",
    ),
    "a job without data": (job(dataset=[]), "this method learns from examples"),
    "a gate without data": (
        job(
            method="merge",
            merge={"kind": "adapter", "parts": [{"source": "pvc://models/a"}]},
            dataset=[],
            evaluation={"suites": [{"name": "holdout"}]},
        ),
        "evaluation.suites needs a dataset to measure on",
    ),
    "calibration without data": (
        job(method="quantize", quantize={"scheme": "int4", "algorithm": "gptq"}, dataset=[]),
        "need a dataset to see what is used",
    ),
    "a suite that a reward model cannot answer": (
        job(method="reward", evaluation={"suites": [{"name": "s", "type": "exactMatch"}]}),
        "and answers for all but reward.",
    ),
    "a dataset from nowhere": (
        job(dataset=[{"name": "a"}]), "Set exactly one of uri and feedbackRef.",
    ),
    "a digest of feedback, which grows": (
        job(
            dataset=[
                {
                    "name": "a",
                    "feedbackRef": {"deployment": "chat", "folder": "pvc://logs/said"},
                    "sha256": "0" * 64,
                }
            ]
        ),
        "sha256 is for a file: leave it out beside feedbackRef.",
    ),
    "a whole model promoted as an adapter's canary": (
        job(promotion={"deployment": "smollm2", "strategy": "Canary"}),
        "promotion.strategy Canary needs a whole model: adaptation.type full, or method",
    ),
    "a copy in no bucket": (
        job(output={"s3": "models/a"}), "output.s3 must look like s3://BUCKET/PREFIX, without",
    ),
    "a win rate without a judge": (
        job(evaluation={"suites": [{"name": "s", "type": "winRate"}]}),
        "A suite of type winRate needs evaluation.judge.",
    ),
    "a method without its settings": (job(method="distill"), "Method distill needs spec.distill,"),
    "the settings of another method": (
        job(prune={"kind": "depth"}),
        "Method prune needs spec.prune, and no other method has it.",
    ),
    "a preference measured by perplexity": (
        job(method="dpo", evaluation={"suites": [{"name": "votes"}]}),
        "measure preferenceLoss for methods dpo and reward, reward for grpo and ppo",
    ),
    "a reward model that shall answer": (
        job(method="reward", promotion={"deployment": "smollm2"}),
        "needs a method whose result answers (sft, dpo, distill, grpo, ppo), or strategy Canary.",
    ),
    "a policy without settings": (job(method="ppo"), "Method grpo or ppo needs spec.rl,"),
    "a policy that nothing rewards": (
        job(method="grpo", rl={}),
        "Set rl.rewards, rl.rewardModel or both",
    ),
    "replicas that draw where every weight moves": (
        job(method="grpo", rl=SERVED, adaptation={"type": "full"}),
        "rl.rollout needs adaptation.type lora or qlora, and no roles on Ray",
    ),
    "replicas that draw beside roles on Ray": (
        job(method="grpo", rl=SERVED, roles="Ray"),
        "rl.rollout needs adaptation.type lora or qlora, and no roles on Ray",
    ),
    "a rule without its pattern": (
        job(method="grpo", rl={"rewards": [{"type": "regex"}]}),
        "A regex rule needs a pattern and a length rule needs tokens",
    ),
    "a group size no kernel has": (
        job(method="quantize", quantize={"scheme": "int4", "groupSize": 48}),
        "spec.quantize.groupSize: Unsupported value: 48",
    ),
    "a dataset of a kind we do not have": (
        job(dataset=[{"name": "a", "uri": "s3://bucket/data.jsonl"}]),
        "A dataset's uri must look like configMap://NAME/KEY, pvc://CLAIM/PATH",
    ),
    "a promotion to nowhere": (
        job(promotion={"strategy": "HotLoadAdapter"}),
        "needs promotion.deployment, the LLMDeployment to promote to.",
    ),
    "a promotion of a whole model as an adapter": (
        job(promotion={"deployment": "smollm2"}, adaptation={"type": "full"}),
        "HotLoadAdapter needs adaptation.type lora or qlora.",
    ),
    "a base in few bits where nothing is trained": (
        job(method="merge", merge={"kind": "adapter", "parts": [{"source": "pvc://models/a"}]},
            adaptation={"type": "qlora"}),
        "adaptation.type qlora is for methods that train, not for merge, quantize, prune.",
    ),
    "best checkpoints without a holdout": (
        job(checkpoint={"keepBest": 1}, processing={"holdoutRatio": 0}),
        "checkpoint.keepBest needs processing.holdoutRatio above 0.",
    ),
    "roles where nobody answers": (job(roles="Ray"), "roles Ray needs method grpo or ppo."),
    "a copy of the model that lacks a worker": (
        job(parallelism={"tensor": 2}, workers={"min": 1, "max": 2}),
        "workers.min and workers.max must be multiples of parallelism.tensor.",
    ),
    "several workers of a method that computes": (
        job(method="merge", merge={"kind": "adapter", "parts": [{"source": "pvc://models/a"}]},
            workers={"min": 1, "max": 2}),
        "workers.max above 1 is for methods that train, not for merge, quantize, prune.",
    ),
    "several workers beside replicas that draw": (
        job(method="grpo", rl=SERVED, workers={"min": 1, "max": 2}),
        "rl.rollout needs workers.max 1.",
    ),
    "copies shared beside roles on Ray": (
        job(method="grpo", rl={"rewards": [{"type": "exactAnswer"}]}, roles="Ray",
            parallelism={"tensor": 2}, workers={"min": 2, "max": 2}),
        "roles Ray needs parallelism.tensor 1.",
    ),
    "texts of a teacher that a deployment serves": (
        job(method="distill", distill={"deployment": "teacher", "teacherAnswers": True}),
        "distill.teacherAnswers needs distill.teacher, and neither onPolicy nor dataWeight.",
    ),
    "a method of another backend": (
        job(backend="Transformers", method="dpo"),
        "backend Transformers runs method sft alone: all other methods need backend Mizzen.",
    ),
    "a base in few bits of another backend": (
        job(backend="Transformers", adaptation={"type": "qlora"}),
        "adaptation.type qlora needs backend Mizzen.",
    ),
    "several workers of another backend": (
        job(backend="Transformers", workers={"min": 1, "max": 2}),
        "workers.max above 1 and checkpoint.keepBest need backend Mizzen.",
    ),
    "a budget of nothing": (job(budget={}), "Set budget.maxHours, maxTokens or both."),
    "a budget where nothing is trained": (
        job(method="merge", merge={"kind": "adapter", "parts": [{"source": "pvc://models/a"}]},
            budget={"maxHours": 1}),
        "budget is for methods that train, not for merge, quantize, prune.",
    ),
    "a number of a trainer's devices without their name": (
        job(resources={"accelerator": {"count": 2}}),
        "resources.accelerator.count needs resources.accelerator.resource, such as nvidia.com/gpu.",
    ),
    "a result with no place to go": (
        job(baseModel={"source": "file:///models/smollm2"}),
        "Set output.uri",
    ),
    "probes of a whole model": (
        job(promotion={"deployment": "smollm2", "strategy": "Canary",
                       "probes": [{"prompt": "a", "expect": "b"}]}),
        "promotion.probes are for HotLoadAdapter",
    ),
    "a trial of a whole model": (
        job(promotion={"deployment": "smollm2", "strategy": "Canary",
                       "trial": {"errorRatio": 0.1}}, adaptation={"type": "full"}),
        "promotion.trial is for HotLoadAdapter",
    ),
    "a trial that judges nothing": (
        job(promotion={"deployment": "smollm2", "trial": {"holdSeconds": 60}}),
        "promotion.trial needs errorRatio or ttftFactor",
    ),
    "an evaluation with nothing held out": (
        job(evaluation={"suites": [{"name": "holdout"}]}, processing={"holdoutRatio": 0}),
        "evaluation.suites needs processing.holdoutRatio above 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("document", "sentence"), REFUSED.values(), ids=REFUSED)
def test_the_api_server_refuses(
    cluster: ApiCluster, namespace: str, document: Document, sentence: str
) -> None:
    with pytest.raises(ClusterError) as refusal:
        apply(cluster, namespace, document, "--dry-run=server")
    assert sentence in str(refusal.value)


def test_a_client_that_prunes_cannot_smuggle_a_host_path_in(
    cluster: ApiCluster, namespace: str
) -> None:
    patch = {"volumes": [{"name": "root", "hostPath": {"path": "/"}}]}
    with pytest.raises(ClusterError, match="hostPath and other kinds are not allowed"):
        apply(cluster, namespace, deployment(podTemplatePatch=patch), "--validate=false")
