"""A whole job as a process: what it leaves behind and how it ends."""

import json
import socket
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hack.ports import free_port
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.config import TrainConfig, load_config
from mizzen.runtime.train.digest import digest_of, hash_files
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.export import build_config
from tests.fixtures.train_runs import run, start, wait_for_step, write_job

LORA = {"adaptation": {"type": "lora", "rank": 4, "alpha": 8.0}}
FULL = {"adaptation": {"type": "full"}, "output": {"kind": "model"}}


BESIDE = {
    "the base as it is": {},
    "a base in 8 bits": {"type": "qlora", "quantization": "int8"},
    "a base in 4 bits": {"type": "qlora", "quantization": "int4"},
}


@pytest.mark.parametrize("base", BESIDE.values(), ids=BESIDE)
def test_publishes_an_adapter_that_peft_loads_beside(tmp_path: Path, base: dict) -> None:
    job = write_job(tmp_path, adaptation={**LORA["adaptation"], **base})
    assert run(job) == 0
    word = job.last_word
    (suite,) = word["evaluation"]
    assert (word["phase"], word["step"], word["totalSteps"]) == ("Succeeded", 8, 8)
    assert suite["passed"] and suite["candidate"] < suite["base"]
    assert word["artifact"]["kind"] == "adapter"
    assert len(job.curve.splitlines()) == 8
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, word["artifact"]["path"])
    assert sum(p.abs().sum() for n, p in adapted.named_parameters() if "lora_B" in n) > 0


def test_a_full_job_publishes_a_model_that_scores_what_the_gate_saw(tmp_path: Path) -> None:
    job = write_job(tmp_path, **FULL)
    assert run(job) == 0
    path = Path(job.last_word["artifact"]["path"])
    trained = load_file(job.checkpoints / "step-00000008" / "weights.safetensors")
    published = load_file(path / "model.safetensors")
    assert published.keys() == trained.keys()
    assert all(torch.equal(published[name], trained[name]) for name in trained)
    reference = AutoModelForCausalLM.from_pretrained(path)
    token_ids = torch.arange(20)
    from_folder = load_decoder(path)
    ours = from_folder.logits(from_folder(token_ids, token_ids, CausalAttention([20])))
    torch.testing.assert_close(ours, reference(token_ids[None]).logits[0], rtol=1e-3, atol=1e-3)


def test_the_artifacts_name_and_record_follow_from_its_files(tmp_path: Path) -> None:
    job = write_job(tmp_path, **LORA)
    assert run(job) == 0
    artifact = job.last_word["artifact"]
    folder = Path(artifact["path"])
    record = json.loads((folder / "artifact.json").read_text())
    digest = digest_of(hash_files(folder))
    assert artifact["digest"] == record["digest"] == f"sha256:{digest}"
    assert folder == tmp_path / "output" / digest[:12]
    assert record["files"] == hash_files(folder)
    assert artifact["bytes"] == sum((folder / name).stat().st_size for name in record["files"])
    assert all(path.stat().st_mode & 0o044 for path in folder.iterdir())


def test_a_finished_job_that_runs_again_publishes_nothing_new(tmp_path: Path) -> None:
    job = write_job(tmp_path, **LORA)
    assert run(job) == 0
    first, times = job.last_word, [path.stat().st_mtime_ns for path in job.artifacts]
    assert run(job) == 0
    assert job.last_word["artifact"] == first["artifact"]
    assert job.last_word["loss"] == first["loss"]
    assert [path.stat().st_mtime_ns for path in job.artifacts] == times
    assert not list(tmp_path.glob("output/.partial*"))


def test_a_tampered_artifact_is_replaced_by_the_true_one(tmp_path: Path) -> None:
    job = write_job(tmp_path, **LORA)
    assert run(job) == 0
    (folder,) = job.artifacts
    (folder / "adapter_config.json").write_text("{}")
    assert run(job) == 0
    assert f"sha256:{digest_of(hash_files(folder))}" == job.last_word["artifact"]["digest"]


def test_another_result_gets_another_path(tmp_path: Path) -> None:
    job = write_job(tmp_path, **LORA)
    assert run(job) == 0
    directory = {"directory": str(tmp_path / "checkpoints-2")}
    write_job(tmp_path, **LORA, hyperparameters={"seed": 9}, checkpoint=directory)
    assert run(job) == 0
    assert len(job.artifacts) == 2


def test_a_candidate_that_got_worse_is_reported_and_not_published(tmp_path: Path) -> None:
    good = write_job(tmp_path / "good", **FULL, hyperparameters={"max_steps": 30})
    assert run(good) == 0
    # So high a rate makes noise of what the good model has learned.
    ruin = {"learning_rate": 1.0, "warmup_ratio": 0.0, "scheduler": "constant"}
    job = write_job(
        tmp_path / "ruined", **LORA, base_model=str(good.artifacts[0]), hyperparameters=ruin
    )
    assert run(job) == 0
    word = job.last_word
    (suite,) = word["evaluation"]
    assert not suite["passed"]
    assert suite["regressionRatio"] > 0.02
    assert (word["phase"], word["artifact"], job.artifacts) == ("Succeeded", None, [])


def test_without_suites_there_is_no_gate_and_nothing_need_be_held_out(tmp_path: Path) -> None:
    job = write_job(tmp_path, **LORA, evaluation={"suites": []}, processing={"holdout_ratio": 0.0})
    assert run(job) == 0
    assert job.last_word["evaluation"] == []
    assert len(job.artifacts) == 1


FATAL = {
    "a missing dataset": (
        {"datasets": [{"name": "tickets", "path": "/none.jsonl"}]},
        "DatasetNotFound",
        "dataset tickets: /none.jsonl cannot be read",
    ),
    "a missing model": ({"base_model": "/none"}, "ModelNotFound", "/none"),
    "a linear there is not": (
        {"adaptation": {"targets": ["q_proj", "c_attn"]}},
        "JobConfigInvalid",
        "adaptation.targets names c_attn. Use all-linear",
    ),
    "a field nobody knows": (
        {"hyperparameters": {"lr": 1}},
        "JobConfigInvalid",
        "hyperparameters.lr: Extra inputs are not permitted",
    ),
    "several workers where one must do": (
        {
            "workers": 2,
            "method": "grpo",
            "rl": {
                "rewards": [{"type": "exactAnswer"}],
                "rollout": {"url": "http://replicas"},
            },
            "evaluation": {"suites": []},
        },
        "JobConfigInvalid",
        "rl.rollout runs on one worker: set workers to 1",
    ),
}


@pytest.mark.parametrize(("overrides", "reason", "text"), FATAL.values(), ids=FATAL)
def test_ends_with_42_and_a_sentence_for(
    tmp_path: Path, overrides: dict, reason: str, text: str
) -> None:
    job = write_job(tmp_path, **overrides)
    assert run(job) == 42
    assert job.last_word["reason"] == reason
    assert text in job.last_word["message"]


def test_a_loss_that_is_no_number_ends_the_job_and_leaves_the_last_good_step(
    tmp_path: Path,
) -> None:
    wild = {"learning_rate": 1e30, "warmup_ratio": 0.0, "scheduler": "constant"}
    job = write_job(tmp_path, **LORA, hyperparameters=wild, checkpoint={"every_steps": 1})
    assert run(job) == 42
    assert job.last_word["reason"] == "LossNotFinite"
    assert "Lower hyperparameters.learningRate" in job.last_word["message"]


def test_a_full_volume_lets_the_job_try_again(tmp_path: Path) -> None:
    job = write_job(tmp_path, **LORA)
    job.checkpoints.mkdir()
    assert run(job, file_limit_bytes=8 * 1024) == 1
    assert job.last_word["reason"] == "StorageFull"
    assert "Enlarge the claim" in job.last_word["message"]
    assert run(job) == 0


def progress(port: int) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/progress", headers={"Authorization": "Bearer secret"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return dict(json.load(answer))


def test_a_yield_asked_for_over_http_commits_the_last_whole_step(
    tmp_path: Path,
) -> None:
    port = free_port()
    job = write_job(
        tmp_path,
        **LORA,
        hyperparameters={"max_steps": 100_000},
        checkpoint={"every_steps": None, "every_seconds": None},
        admin_port=port,
    )
    (tmp_path / "token").write_text("secret")
    process = start(job)
    wait_for_step(job, 3)
    seen = progress(port)
    assert (seen["phase"], seen["totalSteps"], seen["checkpoint"]) == ("Running", 100_000, None)
    urllib.request.urlopen(
        urllib.request.Request(
            f"http://127.0.0.1:{port}/yield",
            data=b'{"deadlineSeconds": 600}',
            headers={"Authorization": "Bearer secret"},
        ),
        timeout=300,
    )
    process.join()
    assert process.exitcode == 75
    (committed,) = job.checkpoints.glob("step-*")
    step = int(committed.name.removeprefix("step-"))
    assert step == len(job.curve.splitlines()) >= seen["step"]
    assert job.last_word["checkpoint"]["step"] == job.last_word["step"] == step


def test_a_job_without_a_checkpoint_yields_at_once_while_it_prepares(
    tmp_path: Path,
) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # so that preparing does not end
        slow = {"name": "slow", "url": f"http://127.0.0.1:{silent.getsockname()[1]}/data"}
        job = write_job(tmp_path, **LORA, datasets=[slow], admin_port=port)
        (tmp_path / "token").write_text("secret")
        process = start(job)
        while True:
            try:
                assert progress(port)["phase"] == "Preparing"
                break
            except OSError:
                assert process.exitcode is None
                time.sleep(0.05)
        process.terminate()
        process.join()
    assert process.exitcode == 75


def test_the_contracts_example_is_a_job(tmp_path: Path) -> None:
    document = json.loads((Path(__file__).parent / "golden" / "train_job.json").read_text())
    config = TrainConfig.model_validate(document)
    assert json.loads(config.model_dump_json(exclude_unset=True)) == document


IMPOSSIBLE = {
    "a dataset without a place": (
        {"datasets": [{"name": "a"}]},
        "set exactly one of path, url and feedback",
    ),
    "a digest of feedback, which grows": (
        {"datasets": [{"name": "a", "feedback": "/log", "sha256": "0" * 64}]},
        "sha256 is for a file: leave it out beside feedback",
    ),
    "a scheme we do not fetch": (
        {"datasets": [{"name": "a", "url": "file:///etc/passwd"}]},
        "datasets.0.url: String should match pattern",
    ),
    "an adapter of a full fine-tune": (
        {"adaptation": {"type": "full"}},
        "adaptation full makes output.kind model",
    ),
    "a frozen base in few bits where nothing is trained": (
        {
            "method": "prune",
            "prune": {"kind": "depth"},
            "adaptation": {"type": "qlora"},
            "output": {"kind": "model"},
        },
        "adaptation qlora is for methods that train, not prune",
    ),
    "best checkpoints without a holdout": (
        {
            "checkpoint": {"keep_best": 1},
            "processing": {"holdout_ratio": 0},
            "evaluation": {"suites": []},
        },
        "checkpoint.keep_best needs checkpoint.every_steps and processing.holdout_ratio above 0",
    ),
    "a budget where nothing is trained": (
        {
            "method": "prune",
            "prune": {"kind": "depth"},
            "budget": {"max_hours": 1},
            "output": {"kind": "model"},
        },
        "a budget is for methods that train, not prune",
    ),
    "a full fine-tune of a base in few bits": (
        {"adaptation": {"type": "qlora"}, "output": {"kind": "model"}},
        "adaptation qlora makes output.kind adapter",
    ),
    "a gate without a holdout": (
        {"processing": {"holdout_ratio": 0}},
        "evaluation.suites need processing.holdout_ratio above 0",
    ),
}


@pytest.mark.parametrize(("overrides", "text"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_refuses_a_job_with(tmp_path: Path, overrides: dict, text: str) -> None:
    job = write_job(tmp_path, **overrides)
    with pytest.raises(JobConfigError) as caught:
        load_config(job.config_path)
    assert text in str(caught.value)


def test_a_missing_job_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobConfigError, match=r"job.json cannot be read: No such file"):
        load_config(tmp_path / "job.json")


def test_a_written_configuration_means_the_same_architecture(tmp_path: Path) -> None:
    spec = load_decoder(write_job(tmp_path).root / "model").spec
    assert type(spec).from_config(build_config(spec, torch.float32)) == spec
