"""Workers that share one copy of the model learn, commit and go on as one that holds it whole."""

import json
import re
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, Qwen3Config

from hack.ports import free_port
from hack.tiny_model import write_tiny_model
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.train.config import Parallelism, load_config
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.memory import plan_need
from tests.fixtures.tiny_models import TINY, make_model, save_tiny_tokenizer
from tests.fixtures.train_runs import (
    Job,
    assert_same_curve,
    exit_codes,
    read_curve,
    run,
    start,
    start_workers,
    wait_for_step,
    write_job,
    write_preferences,
)

WAIT_S = 400
LORA = {"adaptation": {"type": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1}}
FULL = {"adaptation": {"type": "full"}, "output": {"kind": "model"}}
EIGHT_BITS = {"adaptation": {**LORA["adaptation"], "type": "qlora", "quantization": "int8"}}
TWELVE = {"hyperparameters": {"max_steps": 12}}


def gpt2(folder: Path) -> Path:
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=48, n_layer=2, n_head=3)
    return saved(folder, config)


def qwen3(folder: Path) -> Path:
    """Its queries and keys are normalised head by head, by weights that all ranks share."""
    return saved(folder, Qwen3Config(**{**TINY, "num_key_value_heads": 3, "head_dim": 16,
                                        "num_attention_heads": 6}))  # fmt: skip


def saved(folder: Path, config: GPT2Config | Qwen3Config) -> Path:
    make_model(config).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def published(job: Job) -> dict[str, torch.Tensor]:
    (folder,) = job.artifacts
    return load_file(next(folder.glob("*model.safetensors")))


# A sync of a busy disk takes long; where nothing is interrupted one commit is enough.
RARELY = {"checkpoint": {"every_steps": None, "every_seconds": None}}


def shared(root: Path, workers: int, *, tensor: int, **overrides: dict) -> Job:
    """Write the same job for so many workers, of which so many share a copy."""
    parallelism = {"parallelism": {"tensor": tensor}}
    return write_job(root, **parallelism, **{**TWELVE, **overrides}, workers=workers)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A LoRA job that one worker trained undisturbed."""
    job = write_job(tmp_path_factory.mktemp("calm"), **LORA, **TWELVE, **RARELY)
    assert run(job) == 0
    return job


def assert_same_result(job: Job, reference: Job) -> None:
    assert len(read_curve(job)) == 12
    assert_same_curve(read_curve(job), read_curve(reference))
    found, expected = published(job), published(reference)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-3, rtol=1e-2)
    figures = [j.last_word["evaluation"][0]["candidate"] for j in (job, reference)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)


CASES = {
    "llama, full": (None, FULL),
    "gpt2, full": (gpt2, FULL),
    "gpt2, lora": (gpt2, LORA),
    "qwen3, full": (qwen3, FULL),
    "llama, beside 8 bits": (None, EIGHT_BITS),
    "llama, beside 4 bits": (None, {"adaptation": {"type": "qlora", "quantization": "int4"}}),
}


@pytest.mark.parametrize(("family", "overrides"), CASES.values(), ids=CASES)
def test_two_ranks_of_a_model_learn_what_one_learns(
    tmp_path: Path, family: Callable[[Path], Path] | None, overrides: dict
) -> None:
    base = {"base_model": str(family(tmp_path / "base"))} if family else {}
    alone = write_job(tmp_path / "alone", **overrides, **base, **TWELVE, **RARELY)
    assert run(alone) == 0
    spread = shared(tmp_path / "spread", 2, tensor=2, **overrides, **base, **RARELY)
    assert exit_codes(start_workers(spread, 2)) == [0, 0]
    assert_same_result(spread, alone)


PREFERENCES = {
    "evaluation": {"suites": [{"name": "holdout", "type": "preferenceLoss"}], "on_fail": "Warn"},
}


# In twelve steps of the usual size all weights bring the loss down a hundredfold, and with it what
# ranks round differently up to where curves no longer compare.
SLOWLY = {**FULL, "hyperparameters": {"max_steps": 12, "learning_rate": 0.001}}


@pytest.mark.parametrize("kind", [{**LORA, **TWELVE}, SLOWLY], ids=["lora", "full"])
@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_two_ranks_learn_preferences_as_one_does(tmp_path: Path, method: str, kind: dict) -> None:
    data = write_preferences(tmp_path / "preferences.jsonl")
    asked = {**kind, **RARELY, **PREFERENCES, "method": method,
             "datasets": [{"name": "colours", "path": str(data)}]}  # fmt: skip
    alone = write_job(tmp_path / "alone", **asked)
    assert run(alone) == 0
    spread = shared(tmp_path / "spread", 2, tensor=2, **asked)
    assert exit_codes(start_workers(spread, 2)) == [0, 0]
    assert_same_result(spread, alone)
    assert len(list(spread.checkpoints.glob("notes/*"))) == (1 if method == "dpo" else 0)


def test_two_ranks_learn_from_a_teacher_as_one_does(tmp_path: Path) -> None:
    # Wider than the student, and spread over the ranks as that is.
    teacher = write_tiny_model(tmp_path / "teacher", width=96, heads=6)
    asked = {**LORA, **RARELY, "method": "distill", "distill": {"teacher": str(teacher)}}
    alone = write_job(tmp_path / "alone", **asked, **TWELVE)
    assert run(alone) == 0
    spread = shared(tmp_path / "spread", 2, tensor=2, **asked)
    assert exit_codes(start_workers(spread, 2)) == [0, 0]
    assert_same_result(spread, alone)
    notes = [[load_file(path) for path in sorted(job.checkpoints.glob("notes/*"))]
             for job in (alone, spread)]  # fmt: skip
    assert len(notes[0]) == 1
    for (name, drawn), theirs in zip(notes[0][0].items(), notes[1][0].values(), strict=True):
        assert torch.equal(drawn, theirs), name


def test_two_copies_of_two_ranks_learn_what_one_worker_learns(tmp_path: Path, calm: Job) -> None:
    spread = shared(tmp_path, 4, tensor=2, **LORA, **RARELY)
    assert exit_codes(start_workers(spread, 4)) == [0, 0, 0, 0]
    assert_same_result(spread, calm)


def start_four(job: Job, **fault_of_last: str) -> list[ForkServerProcess]:
    """Start two copies of two ranks; the last rank of the second is the only one with a fault."""
    job.root.joinpath("token").write_text("secret")
    port = free_port()
    well = [start(job, node_rank=rank, port=port) for rank in range(3)]
    return [*well, start(job, node_rank=3, port=port, **fault_of_last)]


def test_the_leader_keeps_where_all_meet_until_the_last_has_come(tmp_path: Path, calm: Job) -> None:
    spread = shared(tmp_path, 4, tensor=2, **LORA, **RARELY)
    # Only this rank and its neighbour of the other copy are in that group, the leader is not.
    assert exit_codes(start_four(spread, late_for="part-1")) == [0, 0, 0, 0]
    assert_same_result(spread, calm)


@pytest.mark.parametrize("group", ["copy-1", "part-1"])
def test_a_rank_lost_while_groups_form_ends_the_generation_at_once(
    tmp_path: Path, group: str
) -> None:
    job = shared(tmp_path, 4, tensor=2, **LORA, **RARELY)
    assert exit_codes(start_four(job, kill_at_join=group)) == [76, 76, 76, -signal.SIGKILL]


def test_a_checkpoint_goes_on_at_any_number_of_copies_and_ranks(tmp_path: Path, calm: Job) -> None:
    root = tmp_path / "job"
    job = shared(root, 2, tensor=1, **LORA)
    assert exit_codes(start_workers(job, 2, kill_at_sync=14)) == [-signal.SIGKILL, 76]
    first = len(read_curve(job))
    shared(root, 2, tensor=2, **LORA)
    assert exit_codes(start_workers(job, 2, kill_at_sync=14)) == [-signal.SIGKILL, 76]
    second = len(read_curve(job))
    newest = sorted(job.checkpoints.glob("step-*"))[-1]
    assert (newest / "weights-00002-of-00002.safetensors").exists()
    assert 0 < first < second < 12
    shared(root, 1, tensor=1, **LORA)
    assert run(job) == 0
    assert_same_result(job, calm)


def test_the_same_ranks_twice_give_the_same_bytes_also_after_a_file_was_damaged(
    tmp_path: Path,
) -> None:
    short = {"hyperparameters": {"max_steps": 4}, "evaluation": {"suites": []}}
    jobs = [shared(tmp_path / name, 2, tensor=2, **LORA, **short) for name in ("calm", "damaged")]
    for job in jobs:
        assert exit_codes(start_workers(job, 2)) == [0, 0]
    newest = sorted(jobs[1].checkpoints.glob("step-*"))[-1]
    weights = newest / "weights-00002-of-00002.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert exit_codes(start_workers(jobs[1], 2)) == [0, 0]
    assert jobs[1].curve == jobs[0].curve
    assert jobs[1].weights_digest == jobs[0].weights_digest


ENDLESS = {"hyperparameters": {"max_steps": 100_000}}


@pytest.mark.parametrize("asked", [0, 1], ids=["the leader", "another rank"])
def test_all_ranks_stop_at_one_committed_step_when_one_is_asked_to(
    tmp_path: Path, asked: int
) -> None:
    job = shared(tmp_path, 2, tensor=2, **LORA, **ENDLESS)
    ranks = start_workers(job, 2)
    wait_for_step(job, 3)
    ranks[asked].terminate()
    assert exit_codes(ranks) == [75, 75]
    newest = sorted(job.checkpoints.glob("step-*"))[-1]
    assert int(newest.name.removeprefix("step-")) == read_curve(job)[-1].step
    assert len(list(newest.glob("*-of-00002.safetensors"))) == 6


@pytest.mark.parametrize("lost", [0, 1], ids=["the leader", "another rank"])
def test_a_lost_rank_ends_the_generation_with_the_last_checkpoint(
    tmp_path: Path, lost: int
) -> None:
    job = shared(tmp_path, 2, tensor=2, **LORA, **ENDLESS)
    ranks = start_workers(job, 2)
    wait_for_step(job, 3)
    ranks[lost].kill()
    codes = exit_codes(ranks)
    assert codes == ([-signal.SIGKILL, 76] if lost == 0 else [76, -signal.SIGKILL])
    assert (job.checkpoints / "step-00000002" / "manifest.json").exists()


def test_a_rank_whose_volume_is_full_ends_the_generation_and_keeps_what_was_committed(
    tmp_path: Path,
) -> None:
    job = shared(tmp_path, 2, tensor=2, **LORA)
    job.root.joinpath("token").write_text("secret")
    port = free_port()
    ranks = [start(job, port=port), start(job, node_rank=1, port=port, file_limit_bytes=4096)]
    assert exit_codes(ranks) == [76, 1]
    word = json.loads((job.root / "termination-log1").read_text())
    assert word["reason"] == "StorageFull"
    assert list(job.checkpoints.glob("*step-*")) == []


def test_the_gate_asks_all_ranks_together(tmp_path: Path) -> None:
    suites = [
        {"name": "holdout", "type": "perplexity", "max_regression_ratio": 0.02},
        {"name": "said", "type": "exactMatch", "max_new_tokens": 3},
        {"name": "chosen", "type": "classification"},
    ]
    short = {"hyperparameters": {"max_steps": 1}, "evaluation": {"suites": suites}}
    alone = write_job(tmp_path / "alone", **LORA, **short)
    spread = shared(tmp_path / "spread", 2, tensor=2, **LORA, **short)
    assert run(alone) == 0
    assert exit_codes(start_workers(spread, 2)) == [0, 0]
    found, expected = (job.last_word["evaluation"] for job in (spread, alone))
    assert [v["suite"] for v in found] == ["holdout", "said", "chosen"]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["base"] == pytest.approx(theirs["base"], rel=1e-3)
        assert ours["samples"] == theirs["samples"]


def refusal(job: Job, workers: int) -> dict[str, Any]:
    """Return the words of the first worker that refuses; others may miss one that did before."""
    codes = exit_codes(start_workers(job, workers))
    assert set(codes) <= {42, 76}
    return job.word_of(codes.index(42))


def test_more_ranks_than_kv_heads_are_refused(tmp_path: Path) -> None:
    word = refusal(shared(tmp_path, 4, tensor=4, **FULL), 4)
    assert word["reason"] == "TensorParallelInvalid"
    assert "Set parallelism.tensor to at most 2" in word["message"]


RULE = {"type": "exactAnswer"}
BY_RULE = {"method": "ppo", "rl": {"rewards": [RULE]}, "evaluation": {"suites": []}}
REFUSED = {
    "workers must be a multiple of parallelism.tensor, 2": {"workers": 3},
    "method prune runs on one worker: set workers to 1": {
        "method": "prune",
        "prune": {"kind": "nm24"},
    },
    "roles Ray need parallelism.tensor 1, or set roles to InProcess": {**BY_RULE, "roles": "Ray"},
    "rl.rollout runs on one worker: set workers to 1": {
        **BY_RULE,
        "rl": {"rewards": [RULE], "rollout": {"url": "http://replicas"}},
    },
}


@pytest.mark.parametrize(("text", "fields"), REFUSED.items(), ids=REFUSED)
def test_what_ranks_cannot_do_together_is_refused(tmp_path: Path, text: str, fields: dict) -> None:
    job = write_job(tmp_path, **{"workers": 2, "parallelism": {"tensor": 2}, **fields})
    with pytest.raises(JobConfigError, match=re.escape(text)):
        load_config(job.config_path)


def test_int4_groups_that_ranks_would_cut_are_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    # Six heads of 16: two ranks have three of them, three ranks two.
    model = write_tiny_model(tmp_path / "base", width=96, heads=6, kv_heads=6)
    adaptation = {"type": "qlora", "quantization": "int4"}
    job = shared(tmp_path, 2, tensor=2, base_model=str(model), adaptation=adaptation)
    config = load_config(job.config_path)
    plan_need(config.model_copy(update={"parallelism": Parallelism(tensor=3)}),
              ArchSpec.from_dir(model), torch.device("cpu"))  # fmt: skip
    word = refusal(job, 2)
    assert word["reason"] == "QuantizationUnsupported"
    assert word["message"] == (
        "Over 2 ranks some have 48 of the inputs of o_proj: int4 needs multiples of 32. Set "
        "adaptation.quantization to int8, or change parallelism.tensor."
    )


def test_a_rank_needs_memory_for_its_own_part(tmp_path: Path) -> None:
    whole, half = (
        load_config(shared(tmp_path / str(n), n, tensor=n, **FULL).config_path) for n in (1, 2)
    )
    spec, device = ArchSpec.from_dir(whole.base_model), torch.device("cpu")
    needs = [plan_need(config, spec, device).total for config in (whole, half)]
    assert 0.45 < needs[1] / needs[0] < 0.65  # norms are whole, and the vocabulary is padded
