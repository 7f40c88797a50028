"""Backend Transformers: Hugging Face's Trainer keeps every promise of a job."""

import json
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hack.ports import free_port
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.config import Hyperparameters, TrainerEnvironment, load_config
from mizzen.runtime.train.errors import (
    JobConfigError,
    MicroBatchTooLargeError,
    TrainingDoesNotFitError,
)
from mizzen.runtime.train.hugging_face import trainer
from mizzen.runtime.train.hugging_face.trainer import rows_at_once
from mizzen.runtime.train.job import prepare_transformers
from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.stop import StopFlag
from tests.fixtures.tiny_models import save_tiny_gpt_neox
from tests.fixtures.train_runs import Job, preload, run, start, wait_for_step, write_job

preload("mizzen.runtime.train.hugging_face.training")

FULL = {"adaptation": {"type": "full"}, "output": {"kind": "model"}}


SUITES = [
    {"name": "loss"},
    {"name": "words", "type": "classification"},
    {"name": "sentences", "type": "exactMatch", "max_new_tokens": 4},
]


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gpt_neox(tmp_path_factory.mktemp("neox"))


@pytest.fixture(scope="module")
def undisturbed(neox: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = write(tmp_path_factory.mktemp("undisturbed"), neox)
    assert run(job) == 0
    return job


def write(root: Path, base: Path, **overrides: Any) -> Job:
    return write_job(root, backend="Transformers", base_model=str(base), **overrides)


def losses(job: Job) -> list[float]:
    return [json.loads(line)["loss"] for line in job.curve.splitlines()]


def assert_same_outcome(job: Job, reference: Job) -> None:
    assert job.curve == reference.curve
    assert job.weights_digest == reference.weights_digest
    assert job.last_word["evaluation"] == reference.last_word["evaluation"]


def test_an_adapter_of_a_model_we_cannot_serve_learns_passes_and_is_published(
    undisturbed: Job, neox: Path
) -> None:
    word = undisturbed.last_word
    (suite,) = word["evaluation"]
    assert (word["phase"], word["step"], word["totalSteps"]) == ("Succeeded", 8, 8)
    assert suite["passed"] and suite["candidate"] < suite["base"]
    assert losses(undisturbed)[-1] < losses(undisturbed)[0]
    assert word["tokens"] > 0 and word["checkpoint"]["step"] == 8
    base = AutoModelForCausalLM.from_pretrained(neox)
    adapted = PeftModel.from_pretrained(base, word["artifact"]["path"])
    assert sum(p.abs().sum() for n, p in adapted.named_parameters() if "lora_B" in n) > 0
    assert "backend: Transformers" in (undisturbed.artifacts[0] / "README.md").read_text()


def test_both_backends_learn_the_same_and_we_serve_what_either_publishes(tmp_path: Path) -> None:
    jobs = [
        write_job(tmp_path / backend, backend=backend, evaluation={"suites": SUITES}, **FULL)
        for backend in ("Mizzen", "Transformers")
    ]
    assert [run(job) for job in jobs] == [0, 0]
    ours, theirs = jobs
    assert losses(theirs) == pytest.approx(losses(ours), rel=1e-3)
    for expected, measured in zip(*(job.last_word["evaluation"] for job in jobs), strict=True):
        assert measured.pop("suite") == expected.pop("suite")
        assert measured == pytest.approx(expected, rel=1e-3)
    (folder,) = theirs.artifacts
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (tmp_path / "Transformers" / "model" / "config.json").read_text()
    )
    token_ids, decoder = torch.arange(20), load_decoder(folder)
    served = decoder.logits(decoder(token_ids, token_ids, CausalAttention([20])))
    reference = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(served, reference(token_ids[None]).logits[0], rtol=1e-3, atol=1e-3)


def test_a_run_killed_again_and_again_repeats_the_undisturbed_one(
    tmp_path: Path, neox: Path, undisturbed: Job
) -> None:
    job = write(tmp_path, neox)
    # In the gate's base, in the first commit, and each time some writes later than the last one.
    codes = [run(job, kill_at_sync=number) for number in (2, 9, 25, 31)]
    assert codes == [-signal.SIGKILL] * 4
    assert run(job) == 0
    assert_same_outcome(job, undisturbed)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    tmp_path: Path, neox: Path, undisturbed: Job
) -> None:
    job = write(tmp_path, neox)
    assert run(job) == 0
    newest = sorted(job.checkpoints.glob("step-*"))[-1]
    optimizer = newest / "checkpoint-8" / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(bytes(content))
    assert run(job) == 0
    assert_same_outcome(job, undisturbed)


def test_an_adapter_is_asked_questions_as_a_replica_would_answer_them(tmp_path: Path) -> None:
    suites = [{"name": "words", "type": "classification", "max_regression_ratio": 1.0}]
    job = write_job(tmp_path, backend="Transformers", evaluation={"suites": suites})
    assert run(job) == 0
    (suite,) = job.last_word["evaluation"]
    assert (suite["suite"], suite["passed"], suite["samples"]) == ("words", True, 6)
    assert not list(job.checkpoints.glob(".partial*"))


def ask_to_yield(port: int) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/yield",
        data=b'{"deadlineSeconds": 600}',
        headers={"Authorization": "Bearer secret"},
    )
    urllib.request.urlopen(request, timeout=300)


def test_a_yield_commits_the_last_whole_step_and_the_next_generation_repeats_an_undisturbed_run(
    tmp_path: Path, neox: Path
) -> None:
    port = free_port()
    # So many steps that it cannot end before it is asked; a budget ends it afterwards.
    endless = {
        "hyperparameters": {"max_steps": 100_000},
        "checkpoint": {"every_steps": None, "every_seconds": None},
        "admin_port": port,
    }
    job = write(tmp_path / "yielding", neox, **endless)
    (job.root / "token").write_text("secret")
    process = start(job)
    wait_for_step(job, 3)
    ask_to_yield(port)
    process.join()
    assert process.exitcode == 75
    (committed,) = job.checkpoints.glob("step-*")
    step = int(committed.name.removeprefix("step-"))
    assert step == job.last_word["step"] == job.last_word["checkpoint"]["step"] >= 3
    tokens = [json.loads(line)["tokens"] for line in job.curve.splitlines()]
    assert len(tokens) == step
    budget = {"max_tokens": tokens[-1] + 2 * tokens[0]}
    write(tmp_path / "yielding", neox, **endless, budget=budget)
    assert run(job) == 0
    assert job.last_word["step"] > step
    assert job.last_word["budgetSpent"] == "maxTokens"
    reference = write(tmp_path / "reference", neox, **endless, budget=budget)
    assert run(reference) == 0
    assert_same_outcome(job, reference)


def test_a_finished_job_that_runs_again_publishes_nothing_new(tmp_path: Path, neox: Path) -> None:
    job = write(tmp_path, neox, hyperparameters={"max_steps": 2})
    assert run(job) == 0
    first = job.last_word["artifact"]
    assert run(job) == 0
    assert job.last_word["artifact"] == first
    assert len(job.artifacts) == 1


def test_a_loss_that_is_no_number_ends_the_job_and_leaves_the_last_good_step(
    tmp_path: Path, neox: Path
) -> None:
    wild = {"learning_rate": 1e30, "warmup_ratio": 0.0, "scheduler": "constant"}
    job = write(tmp_path, neox, **FULL, hyperparameters=wild, checkpoint={"every_steps": 1})
    assert run(job) == 42
    assert job.last_word["reason"] == "LossNotFinite"
    assert "Lower hyperparameters.learningRate" in job.last_word["message"]
    assert [path.name for path in job.checkpoints.glob("step-*")] == ["step-00000001"]


def test_a_full_volume_lets_the_job_try_again(tmp_path: Path, neox: Path) -> None:
    job = write(tmp_path, neox)
    job.checkpoints.mkdir()
    # Enough for the adapter and not for the optimizer's two moments of it.
    assert run(job, file_limit_bytes=24 * 1024) == 1
    assert job.last_word["reason"] == "StorageFull"
    assert "Enlarge the claim" in job.last_word["message"]
    assert run(job) == 0


REFUSED = {
    "a model our decoder does not know": (
        {"backend": "Mizzen"},
        "UnknownArchitecture",
        "spec.backend Transformers may know it, for method sft.",
    ),
    "linears there are not": (
        {"adaptation": {"targets": ["dense", "q_proj"]}},
        "JobConfigInvalid",
        "adaptation.targets names q_proj, and this model's linears are dense, dense_4h_to_h, ",
    ),
    "questions to a model our decoder does not know": (
        {"evaluation": {"suites": [{"name": "loss"}, {"name": "words", "type": "exactMatch"}]}},
        "JobConfigInvalid",
        "evaluation.suites words are asked by Mizzen's decoder, and it does not know this model. "
        "Use type perplexity.",
    ),
    "a missing dataset": (
        {"datasets": [{"name": "tickets", "path": "/none.jsonl"}]},
        "DatasetNotFound",
        "dataset tickets: /none.jsonl cannot be read",
    ),
}


@pytest.mark.parametrize(("overrides", "reason", "text"), REFUSED.values(), ids=REFUSED)
def test_ends_with_42_and_a_sentence_for(
    tmp_path: Path, neox: Path, overrides: dict[str, Any], reason: str, text: str
) -> None:
    job = write_job(tmp_path, **{"backend": "Transformers", "base_model": str(neox), **overrides})
    assert run(job) == 42
    assert job.last_word["reason"] == reason
    assert text in job.last_word["message"]


def test_a_job_that_cannot_fit_is_refused_before_it_reads_anything(
    tmp_path: Path, neox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mizzen.runtime.train.job.memory_limit", lambda _: 1 << 16)
    job = write(tmp_path, neox, datasets=[{"name": "unread", "path": "/none.jsonl"}])
    with pytest.raises(TrainingDoesNotFitError, match=r"the trainer has 0 MiB"):
        prepare(job)


def test_memory_that_runs_out_ends_the_job_with_what_to_lower(
    tmp_path: Path, neox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 GB")

    monkeypatch.setattr(trainer, "mean_loss", no_room)
    work = prepare(write(tmp_path, neox, evaluation={"suites": []}))
    with pytest.raises(MicroBatchTooLargeError, match=r"with 2 samples at once. Lower hyperpara"):
        work.run()


def prepare(job: Job) -> Any:
    config = load_config(job.config_path)
    board = ProgressBoard(generation=1)
    return prepare_transformers(config, TrainerEnvironment(device="cpu"), board, StopFlag())


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "another method": (
        {"method": "dpo", "evaluation": {"suites": []}},
        "backend Transformers runs sft: use Mizzen for dpo",
    ),
    "a base in few bits": (
        {"adaptation": {"type": "qlora"}},
        "backend Transformers trains full or lora: use Mizzen for qlora",
    ),
    "several workers": ({"workers": 2}, "use Mizzen for several workers"),
    "best checkpoints": ({"checkpoint": {"keep_best": 1}}, "and for checkpoint.keep_best"),
}


@pytest.mark.parametrize(("overrides", "text"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_refuses_a_job_with(
    tmp_path: Path, neox: Path, overrides: dict[str, Any], text: str
) -> None:
    with pytest.raises(JobConfigError) as caught:
        load_config(write(tmp_path, neox, **overrides).config_path)
    assert text in str(caught.value)


DIVISORS = {
    "as many as asked for": (8, 4, 4),
    "the largest that divides the batch": (9, 4, 3),
    "never more than the batch": (3, 8, 3),
    "one by one where nothing else divides": (7, 6, 1),
}


@pytest.mark.parametrize(("batch", "wanted", "expected"), DIVISORS.values(), ids=DIVISORS)
def test_rows_at_once(batch: int, wanted: int, expected: int) -> None:
    assert rows_at_once(Hyperparameters(batch_size=batch, micro_batch=wanted)) == expected
