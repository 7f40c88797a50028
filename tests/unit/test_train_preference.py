"""Learning from preferences: pairs as data, the losses over them, and what is published."""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import load_adapter
from mizzen.runtime.model.lora.serving import LoraSlots
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.config import Dataset
from mizzen.runtime.train.errors import DatasetError
from mizzen.runtime.train.methods import dpo, token_loss
from mizzen.runtime.train.methods.dpo import Dpo
from mizzen.runtime.train.methods.reward import HEAD_FILE, HEAD_NAME, Reward, rewards_of
from mizzen.runtime.train.methods.token_loss import token_log_probs
from mizzen.runtime.train.options import Dpo as DpoOptions
from mizzen.runtime.train.samples import Pair, Rating, Sample
from mizzen.runtime.train.sources import Source, load_source
from tests.fixtures.train_runs import run, write_job, write_preferences

VOTES = {"suites": [{"name": "votes", "type": "preferenceLoss"}]}
ASK, GOOD, BAD = "hi?", "yes", "no"
TURNS = [
    {"role": "user", "content": ASK},
    {"role": "assistant", "content": GOOD},
]


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    return load_decoder(write_tiny_model(tmp_path / "tiny"), dtype=torch.float32)


def sample(length: int, seed: int) -> Sample:
    random = np.random.RandomState(seed)
    is_label_T = np.arange(length) >= length // 2
    return Sample(random.randint(0, 250, length).astype(np.int32), is_label_T)


def pairs() -> list[Pair]:
    return [Pair(sample(9, 0), sample(14, 1)), Pair(sample(20, 2), sample(5, 3))]


def log_prob(decoder: Decoder, one: Sample) -> float:
    """The textbook: the log-probabilities of one sample's labels, from all its logits."""
    batch = pack([one], torch.device("cpu"))
    hidden_TD = token_loss.hidden_states(decoder, batch, None)
    log_probs_TV = F.log_softmax(decoder.logits(hidden_TD), -1)
    labels = np.flatnonzero(one.is_label_T)
    return sum(log_probs_TV[i - 1, int(one.token_ids_T[i])].item() for i in labels)


def read(path: Path, row: dict[str, Any], shape: Any = "preference") -> Source:
    path.write_text(json.dumps(row))
    return load_source(Dataset(name="votes", path=path), default_format="auto", shape=shape)


READABLE = {
    "texts": {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    "a prompt of turns": {"prompt": TURNS[:1], "chosen": GOOD, "rejected": BAD},
    "answers as turns": {
        "prompt": ASK,
        "chosen": TURNS[1:],
        "rejected": [{"role": "assistant", "content": BAD}],
    },
    "whole conversations": {
        "chosen": TURNS,
        "rejected": [TURNS[0], {"role": "assistant", "content": BAD}],
    },
}


@pytest.mark.parametrize("row", READABLE.values(), ids=READABLE)
def test_reads_a_preference_given_as(tmp_path: Path, row: dict[str, Any]) -> None:
    (pair,) = read(tmp_path / "d", row).conversations
    assert [m["content"] for m in pair.messages] == [ASK, GOOD]
    assert pair.rejected is not None
    assert [m["content"] for m in pair.rejected] == [ASK, BAD]


REFUSED = {
    "an answer too few": ({"prompt": ASK, "chosen": GOOD}, 'has no "chosen" and "rejected"'),
    "answers without a prompt": ({"chosen": GOOD, "rejected": BAD}, 'has no "prompt"'),
    "a conversation that ends with a question": (
        {"chosen": TURNS[:1], "rejected": TURNS},
        "chosen and rejected must end with an assistant turn",
    ),
    "a number for an answer": (
        {"prompt": ASK, "chosen": 1, "rejected": BAD},
        '"chosen" must be a non-empty list',
    ),
}


@pytest.mark.parametrize(("row", "text"), REFUSED.values(), ids=REFUSED)
def test_refuses_as_a_preference(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    with pytest.raises(DatasetError, match="line 1") as caught:
        read(tmp_path / "d", row)
    assert text in str(caught.value)


RATED = {
    "turns": {"messages": TURNS, "label": True},
    "texts": {"prompt": ASK, "completion": GOOD, "label": True},
}


@pytest.mark.parametrize("row", RATED.values(), ids=RATED)
def test_reads_an_answer_that_was_liked_given_as(tmp_path: Path, row: dict[str, Any]) -> None:
    (rated,) = read(tmp_path / "d", row, "judgement").conversations
    assert ([m["content"] for m in rated.messages], rated.is_liked) == ([ASK, GOOD], True)
    assert rated.rejected is None
    (pair,) = read(tmp_path / "d", READABLE["texts"], "judgement").conversations
    assert (pair.is_liked, pair.rejected is None) == (None, False)


UNRATED = {
    "neither of the two": ({"prompt": ASK}, 'has no "chosen" and "rejected" and no "label"'),
    "a number for a label": ({"messages": TURNS, "label": 1}, "label must be true or false"),
    "a question with a label": (
        {"messages": TURNS[:1], "label": True},
        "what has a label must end with an assistant turn",
    ),
}


@pytest.mark.parametrize(("row", "text"), UNRATED.values(), ids=UNRATED)
def test_refuses_as_a_judgement(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    with pytest.raises(DatasetError, match="line 1") as caught:
        read(tmp_path / "d", row, "judgement")
    assert text in str(caught.value)


def test_dpo_has_no_use_for_an_answer_that_stands_alone(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r'has no "chosen" and "rejected"; its keys'):
        read(tmp_path / "d", RATED["texts"])


def test_log_probabilities_of_packed_samples_are_the_samples_own(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "LOGIT_ROWS", 3)
    versions = [version for pair in pairs() for version in (pair.chosen, pair.rejected)]
    batch = pack(versions, torch.device("cpu"))
    found = dpo.sum_by_sample(batch, token_log_probs(decoder, batch, None))
    wanted = [log_prob(decoder, version) for version in versions]
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_dpo_loss_is_the_papers(decoder: Decoder, smoothing: float) -> None:
    rules = DpoOptions(beta=0.3, label_smoothing=smoothing)
    around: Any = SimpleNamespace(config=SimpleNamespace(dpo=rules))
    noted = [replace(pair, reference_margin=2.0) for pair in pairs()]
    margins = [log_prob(decoder, p.chosen) - log_prob(decoder, p.rejected) - 2.0 for p in noted]

    def minus_log_sigmoid(x: float) -> float:
        return math.log1p(math.exp(-x))

    wanted = sum(
        (1 - smoothing) * minus_log_sigmoid(0.3 * m) + smoothing * minus_log_sigmoid(-0.3 * m)
        for m in margins
    )
    assert Dpo(around).loss_sum(decoder, noted, None).item() == pytest.approx(wanted, rel=1e-4)


def test_a_base_compared_with_itself_has_no_preference(decoder: Decoder) -> None:
    around: Any = SimpleNamespace(config=SimpleNamespace(dpo=DpoOptions()))
    method = Dpo(around)
    answers = method.ask(decoder, pairs(), first=0)
    noted = [method.note(pair, answer) for pair, answer in zip(pairs(), answers, strict=True)]
    total, weight = method.count(decoder, noted, None)
    assert total / weight == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("adaptation", ["lora", "full", "qlora"])
def test_dpo_makes_the_chosen_answers_likelier(tmp_path: Path, adaptation: str) -> None:
    kind = "model" if adaptation == "full" else "adapter"
    job = write_job(
        tmp_path,
        method="dpo",
        dpo={"beta": 0.5},
        adaptation={"type": adaptation},
        datasets=[{"name": "votes", "path": str(write_preferences(tmp_path / "votes.jsonl"))}],
        hyperparameters={"learning_rate": 0.01 if kind == "adapter" else 0.001, "max_steps": 12},
        evaluation=VOTES,
        output={"kind": kind},
    )
    assert run(job) == 0
    (suite,) = job.last_word["evaluation"]
    assert suite["base"] == pytest.approx(math.log(2), abs=1e-3)
    assert suite["candidate"] < 0.5 * suite["base"]
    assert suite["regressionRatio"] == pytest.approx(suite["candidate"] / suite["base"] - 1)
    assert job.last_word["artifact"]["kind"] == kind


def test_dpo_killed_while_it_asks_its_base_repeats_the_undisturbed_run(tmp_path: Path) -> None:
    overrides: dict[str, Any] = {
        "method": "dpo",
        "datasets": [{"name": "votes", "path": str(write_preferences(tmp_path / "votes.jsonl"))}],
        "evaluation": VOTES,
        "hyperparameters": {"max_steps": 4},
    }
    reference = write_job(tmp_path / "reference", **overrides)
    assert run(reference) == 0
    job = write_job(tmp_path / "killed", **overrides)
    # Before, within and after the notes of the base, and in the midst of its evaluation.
    assert [run(job, kill_at_sync=number) for number in (1, 2, 4)] == [-signal.SIGKILL] * 3
    assert run(job) == 0
    assert job.curve == reference.curve
    assert job.weights_digest == reference.weights_digest


def write_ratings(path: Path) -> Path:
    """Write the answers of preferences by themselves."""
    pairs = map(json.loads, write_preferences(path).read_text().splitlines())
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("adaptation", ["lora", "qlora"])
@pytest.mark.parametrize("write", [write_preferences, write_ratings])
def test_a_reward_model_is_published_with_its_head_and_ranks_what_it_has_not_seen(
    tmp_path: Path, write: Callable[[Path], Path], adaptation: str
) -> None:
    job = write_job(
        tmp_path,
        method="reward",
        adaptation={"type": adaptation},
        datasets=[{"name": "votes", "path": str(write(tmp_path / "votes.jsonl"))}],
        hyperparameters={"max_steps": 12},
        evaluation=VOTES,
    )
    assert run(job) == 0
    (suite,) = job.last_word["evaluation"]
    assert suite["base"] == pytest.approx(math.log(2))
    assert suite["candidate"] < 0.5 * suite["base"]
    folder = Path(job.last_word["artifact"]["path"])
    decoder = load_decoder(tmp_path / "model", dtype=torch.float32)
    slots = LoraSlots(decoder)
    slots.load(1, load_adapter(folder))
    head_1D = load_file(folder / HEAD_FILE)[HEAD_NAME]
    good, bad = (render(tmp_path / "model", answer) for answer in ("teal it is", "no green"))
    lora = slots.batch([1, 1], [len(good), len(bad)])
    better, worse = rewards_of(decoder, [good, bad], lora, head_1D)
    assert better > worse


def render(model: Path, answer: str) -> Sample:
    messages = [{"role": "user", "content": "99 teal?"}, {"role": "assistant", "content": answer}]
    token_ids, mask = Tokenizer.load(model).render_for_training(messages)
    return Sample(np.asarray(token_ids, np.int32), np.asarray(mask))


def test_a_reward_is_read_off_the_last_token_of_each_sample(decoder: Decoder) -> None:
    spec, device = decoder.spec, torch.device("cpu")
    (view,) = Reward(SimpleNamespace(spec=spec, device=device)).heads()  # type: ignore[arg-type]
    assert view.parameter.abs().sum() == 0
    head_1D = torch.randn(1, spec.hidden_size)
    one, two = sample(7, 0), sample(11, 1)
    together = rewards_of(decoder, [one, two], None, head_1D)
    alone = [rewards_of(decoder, [each], None, head_1D).item() for each in (one, two)]
    assert together.tolist() == pytest.approx(alone, rel=1e-4)


def test_the_reward_loss_is_the_sources_for_pairs_and_beside_zero_for_single_answers(
    decoder: Decoder,
) -> None:
    around = SimpleNamespace(spec=decoder.spec, device=torch.device("cpu"))
    method = Reward(around)  # type: ignore[arg-type]
    (view,) = method.heads()
    with torch.no_grad():
        view.parameter.normal_()
    (one, other), alone = pairs(), sample(8, 5)
    items = [one, Rating(alone, is_liked=True), other, Rating(alone, is_liked=False)]
    told = [one.chosen, one.rejected, other.chosen, other.rejected, alone]
    a, b, c, d, e = rewards_of(decoder, told, None, view.parameter).unbind()
    wanted = -F.logsigmoid(torch.stack([a - b, e, c - d, -e])).sum()
    torch.testing.assert_close(method.loss_sum(decoder, items, None), wanted)
    assert method.count(decoder, items, None)[1] == 4


def test_pairs_that_a_cut_makes_equal_are_dropped(tmp_path: Path) -> None:
    long = "x" * 80
    rows = [
        {"prompt": long, "chosen": "a", "rejected": "b"},
        *({"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(12)),
    ]
    path = tmp_path / "votes.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    job = write_job(
        tmp_path,
        method="dpo",
        datasets=[{"name": "votes", "path": str(path)}],
        hyperparameters={"max_steps": 1},
        evaluation=VOTES,
    )
    assert run(job) == 0
    assert job.last_word["dataset"]["dropped"] == 1
