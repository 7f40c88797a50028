"""A student learns from ids that its teacher drew in advance."""

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from hack.tiny_model import write_tiny_model
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.methods.distill import Distill
from mizzen.runtime.train.methods.distill_on_policy import OnPolicyDistill, ScoredAnswer
from mizzen.runtime.train.methods.distill_sequence import SequenceDistill
from mizzen.runtime.train.methods.token_loss import hidden_states, token_losses_sum
from mizzen.runtime.train.options import Distill as DistillOptions
from mizzen.runtime.train.samples import Sample, TaughtSample
from tests.fixtures.train_runs import read_curve, run, write_job

CPU = torch.device("cpu")


def method_of(**options: Any) -> Distill:
    rules = DistillOptions(teacher=Path("teacher"), **options)
    hyper = SimpleNamespace(seed=0)
    config: Any = SimpleNamespace(distill=rules, hyperparameters=hyper)
    return Distill(SimpleNamespace(config=config))  # type: ignore[arg-type]


def sample(length: int = 20, seed: int = 0) -> Sample:
    random = np.random.RandomState(seed)
    token_ids_T = random.randint(0, 250, length).astype(np.int32)
    return Sample(token_ids_T, np.arange(length) >= length // 2)


def test_drawn_ids_follow_the_teachers_distribution(tmp_path: Path) -> None:
    teacher = load_decoder(write_tiny_model(tmp_path), dtype=torch.float32)
    one = sample()
    with torch.no_grad():
        (drawn_NK,) = method_of(samples=1024).ask(teacher, [one], first=0)
        batch = pack([one], CPU)
        hidden_ND = hidden_states(teacher, batch, None)[batch.source_N]
        wanted_NV = teacher.logits(hidden_ND).softmax(-1)
    found_NV = F.one_hot(drawn_NK.long(), wanted_NV.shape[1]).float().mean(1)
    assert drawn_NK.shape == (10, 1024)
    likely = wanted_NV > 0.02
    assert likely.any()
    torch.testing.assert_close(found_NV[likely], wanted_NV[likely], atol=0.03, rtol=0.0)


def test_an_items_ids_do_not_depend_on_which_others_were_asked_with_it(tmp_path: Path) -> None:
    teacher = load_decoder(write_tiny_model(tmp_path), dtype=torch.float32)
    method, items = method_of(samples=8), [sample(seed=1), sample(12, seed=2)]
    with torch.no_grad():
        together = method.ask(teacher, items, first=5)
        alone = [method.ask(teacher, [item], first=5 + i)[0] for i, item in enumerate(items)]
    assert [a.tolist() for a in together] == [a.tolist() for a in alone]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_loss_mixes_the_teachers_ids_with_the_datas_own(tmp_path: Path, share: float) -> None:
    student = load_decoder(write_tiny_model(tmp_path), dtype=torch.float32)
    one, drawn = sample(), np.asarray([[3, 3, 7, 9]] * 10, np.int32)
    batch = pack([one], CPU)
    hidden_ND = hidden_states(student, batch, None)[batch.source_N]
    log_probs = F.log_softmax(student.logits(hidden_ND), -1)
    by_teacher = -(2 * log_probs[:, 3] + log_probs[:, 7] + log_probs[:, 9]).sum() / 4
    by_data = token_losses_sum(student, batch, None)
    wanted = (1 - share) * by_teacher + share * by_data
    found = method_of(data_weight=share).loss_sum(student, [TaughtSample(one, drawn)], None)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("adaptation", ["full", "qlora"])
def test_a_student_comes_nearer_to_its_teacher(tmp_path: Path, adaptation: str) -> None:
    # A teacher that was trained a little: a random one has nothing to say about the data.
    full = {"adaptation": {"type": "full"}, "output": {"kind": "model"}}
    steps = {"max_steps": 30, "learning_rate": 0.003}
    teacher = write_job(tmp_path / "teacher", **full, hyperparameters=steps)
    assert run(teacher) == 0
    beside = {"adaptation": {"type": adaptation}, "hyperparameters": {"max_steps": 30}}
    student = write_job(
        tmp_path / "student",
        method="distill",
        distill={"teacher": str(teacher.artifacts[0]), "samples": 16},
        **({**full, "hyperparameters": steps} if adaptation == "full" else beside),
    )
    assert run(student) == 0
    (suite,) = student.last_word["evaluation"]
    assert suite["candidate"] < 0.5 * suite["base"]
    notes = list((student.checkpoints / "notes").iterdir())
    assert len(notes) == 1
    times = [path.stat().st_mtime_ns for path in notes]
    assert run(student) == 0
    assert [path.stat().st_mtime_ns for path in notes] == times


def test_a_teachers_text_takes_the_place_of_the_datas_but_not_in_the_gate(tmp_path: Path) -> None:
    teacher = load_decoder(write_tiny_model(tmp_path), dtype=torch.float32)
    around: Any = SimpleNamespace(
        config=SimpleNamespace(
            distill=DistillOptions(teacher=tmp_path, teacher_answers=True, max_new_tokens=9),
            processing=SimpleNamespace(max_seq_len=16),
        ),
        spec=teacher.spec,
        tokenizer=SimpleNamespace(eos_token_ids=()),
        draw_at_most=64,
    )
    method, items = SequenceDistill(around), [sample(20, seed=1), sample(12, seed=2)]
    items = [Sample(one.token_ids_T[:16], one.is_label_T[:16]) for one in items]
    answers = method.ask(teacher, items, first=0)
    noted = [method.note(one, answer) for one, answer in zip(items, answers, strict=True)]
    assert [(len(one), one.labels) for one in noted] == [(16, 6), (15, 9)]
    for one, item in zip(noted, items, strict=True):
        start = int(item.is_label_T.argmax())
        assert one.own is item
        assert one.taught.token_ids_T[:start].tolist() == item.token_ids_T[:start].tolist()
        with torch.no_grad():
            hidden_TD = hidden_states(teacher, pack([one.taught], CPU), None)
        likeliest = teacher.logits(hidden_TD[start - 1 : -1]).argmax(-1)
        assert likeliest.tolist() == one.taught.token_ids_T[start:].tolist()
    with torch.no_grad():
        own = token_losses_sum(teacher, pack(items, CPU), None).item()
    assert method.count(teacher, noted, None) == (pytest.approx(own), 6 + 6)


def test_a_student_learns_the_texts_of_its_teacher(tmp_path: Path) -> None:
    job = write_job(
        tmp_path,
        method="distill",
        distill={
            "teacher": str(write_tiny_model(tmp_path / "teacher", layers=3)),
            "teacher_answers": True,
            "max_new_tokens": 6,
        },
        adaptation={"type": "full"},
        output={"kind": "model"},
        hyperparameters={"max_steps": 30, "learning_rate": 0.01},
        evaluation={"suites": []},
    )
    # Killed after the teacher has answered, it goes on with what was answered.
    assert run(job, kill_at_sync=4) == -signal.SIGKILL
    (notes,) = (job.checkpoints / "notes").iterdir()
    answered_at = notes.stat().st_mtime_ns
    assert run(job) == 0
    assert notes.stat().st_mtime_ns == answered_at
    losses = [record.loss for record in read_curve(job)]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_a_teacher_with_other_tokens_is_refused_with_both_digests(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "other")
    tokenizer = RustTokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|more|>", special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    job = write_job(tmp_path, method="distill", distill={"teacher": str(path)})
    assert run(job) == 42
    word = job.last_word
    assert word["reason"] == "TeacherTokenizerDiffers"
    assert len(set(re.findall(r"[0-9a-f]{64}", word["message"]))) == 2


def test_on_policy_a_students_answers_come_nearer_to_its_teacher(tmp_path: Path) -> None:
    full = {"adaptation": {"type": "full"}, "output": {"kind": "model"}}
    steps = {"max_steps": 30, "learning_rate": 0.003}
    teacher = write_job(tmp_path / "teacher", **full, hyperparameters=steps)
    assert run(teacher) == 0
    student = write_job(
        tmp_path / "student",
        method="distill",
        distill={"teacher": str(teacher.artifacts[0]), "on_policy": True, "max_new_tokens": 8},
        **full,
        hyperparameters={**steps, "max_steps": 40, "batch_size": 32, "micro_batch": 32},
        evaluation={"suites": []},
    )
    assert run(student) == 0
    apart = [json.loads(line)["measured"]["kl"] for line in student.curve.splitlines()]
    assert sum(apart[-6:]) < 0.7 * sum(apart[:6])


def test_the_gradient_on_policy_is_that_of_the_reverse_divergence(tmp_path: Path) -> None:
    # Over all answers of one token, weighed by how likely they are, the estimate is exact.
    student = load_decoder(write_tiny_model(tmp_path / "s"), dtype=torch.float32)
    weight = student.norm.weight.requires_grad_(True)
    prompt = np.asarray([5, 6, 7], np.int32)
    here = pack([Sample(np.append(prompt, 0).astype(np.int32), np.arange(4) == 3)], CPU)
    hidden_1D = hidden_states(student, here, None)[here.source_N]
    log_probs_V = student.logits(hidden_1D).log_softmax(-1)[0]
    teacher_V = torch.randn(len(log_probs_V), generator=torch.Generator().manual_seed(1))
    teacher_V = teacher_V.log_softmax(-1)
    divergence = (log_probs_V.exp() * (log_probs_V - teacher_V)).sum()
    (wanted,) = torch.autograd.grad(divergence, [weight])
    method: Any = OnPolicyDistill.__new__(OnPolicyDistill)
    found = torch.zeros_like(wanted)
    for token_id, (log_prob, teacher) in enumerate(
        zip(log_probs_V.tolist(), teacher_V.tolist(), strict=True)
    ):
        answer = Sample(np.append(prompt, token_id).astype(np.int32), np.arange(4) == 3)
        item = ScoredAnswer(
            sample=answer,
            old_N=np.asarray([log_prob], np.float32),
            advantage_N=np.asarray([teacher - log_prob + 0.7], np.float32),
        )
        loss = method.loss_sum(student, [item], None)
        found += np.exp(log_prob) * torch.autograd.grad(loss, [weight])[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


BAD_RULES: dict[str, tuple[dict[str, Any], str]] = {
    "no teacher": ({"samples": 4}, "set teacher, a model's path, or served"),
    "two teachers": (
        {"teacher": "/t", "served": {"url": "http://x", "model": "m"}},
        "set teacher, a model's path, or served",
    ),
    "the data's tokens, of which on_policy learns none": (
        {"teacher": "/t", "on_policy": True, "data_weight": 0.5},
        "leave data_weight out",
    ),
    "texts of a teacher that is served": (
        {"served": {"url": "http://x", "model": "m"}, "teacher_answers": True},
        "teacher_answers needs teacher, a model's path",
    ),
    "texts of both": (
        {"teacher": "/t", "on_policy": True, "teacher_answers": True},
        "set one of teacher_answers and on_policy",
    ),
    "the data's tokens, of which teacher_answers learns none": (
        {"teacher": "/t", "teacher_answers": True, "data_weight": 0.5},
        "leave data_weight out",
    ),
}


@pytest.mark.parametrize(("rules", "text"), BAD_RULES.values(), ids=BAD_RULES)
def test_rules_that_contradict_each_other_are_refused(rules: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DistillOptions(**rules)
