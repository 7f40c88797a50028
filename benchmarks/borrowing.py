"""A deployment, and a job that borrows the devices beside it, as benchmarks write them."""

from __future__ import annotations

from typing import Any

GPU = "nvidia.com/gpu"
BORROWED = 3  # devices of the job: all of a node of four but the first replica's
Json = dict[str, Any]


def scaled_deployment(name: str, *, most: int, concurrency: float, **fields: Any) -> Json:
    """One to `most` replicas of the quickstart's model, each on a device of its own."""
    return {
        "kind": "LLMDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": "pvc://models/smollm2", "maxModelLen": 2048},
            "accelerator": {"resource": GPU, "count": 1},
            "engine": {"kvCacheGiB": 0.25},
            "scaling": {"min": 1, "max": most, "targets": {"concurrency": concurrency}},
            **fields,
        },
    }


def borrowing_job(name: str, *, of: str, hyperparameters: Json, **fields: Any) -> Json:
    """A LoRA job on the quickstart's dialogues for a deployment, on devices that it can spare."""
    return {
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "method": "sft",
            "adaptation": {"type": "lora", "rank": 8, "alpha": 16},
            "baseModel": {"deployment": of},
            "dataset": [{"name": "dialogues", "uri": "configMap://chatterbot/data.jsonl"}],
            "processing": {"maxSeqLen": 96, "holdoutRatio": 0.1},
            "hyperparameters": hyperparameters,
            "checkpoint": {"everySteps": 20},
            "resources": {"accelerator": {"resource": GPU, "count": BORROWED}},
            "spareCapacity": {"enabled": True, "yieldWithinSeconds": 30},
            **fields,
        },
    }
