"""Memory that runs out where nothing is learned: fewer samples at once, and the same outcome."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train import fewer
from mizzen.runtime.train.config import Suite, load_config
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.errors import MemoryTooSmallError, StorageFullError
from mizzen.runtime.train.evaluate import Examination, TallyStore
from mizzen.runtime.train.fewer import FewerStore, Limits
from mizzen.runtime.train.generate import Drawing, draw_answers, drawn_at_once
from mizzen.runtime.train.halving import AtOnce, FewerAtOnce
from mizzen.runtime.train.job import fingerprint
from mizzen.runtime.train.methods.dpo import Dpo
from mizzen.runtime.train.methods.ppo import Ppo
from mizzen.runtime.train.methods.sft import Sft
from mizzen.runtime.train.notes import NoteStore, take_notes
from mizzen.runtime.train.samples import Pair, Prompt, Sample
from mizzen.runtime.train.stop import StopFlag
from mizzen.runtime.train.suites.exam import MethodExam, Subject
from mizzen.runtime.train.surroundings import Surroundings
from tests.fixtures.train_runs import write_job, write_prompts

NO_ROOM = "DefaultCPUAllocator: not enough memory: you tried to allocate 1 GB"
RULES = {"max_new_tokens": 8, "temperature": 1.0, "eos_ids": ()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def decoder(model: Path) -> Decoder:
    return load_decoder(model, dtype=torch.float32)


@contextmanager
def room_for(decoder: Decoder, tokens: int) -> Iterator[list[int]]:
    """Let memory run out where more tokens are read at once; yield how many were tried."""
    tried: list[int] = []

    def look(_: object, args: Sequence[Any]) -> None:
        tried.append(len(args[0]))
        if len(args[0]) > tokens:
            raise RuntimeError(NO_ROOM)

    hook = decoder.register_forward_pre_hook(look)
    yield tried
    hook.remove()


def sample(length: int, seed: int) -> Sample:
    token_ids_T = np.random.RandomState(seed).randint(0, 250, length).astype(np.int32)
    return Sample(token_ids_T, np.arange(length) >= length // 2)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(sample(4, seed).token_ids_T) for seed in range(count)]


def draw(decoder: Decoder, rules: Drawing) -> list[list[int]]:
    return draw_answers(decoder, prompts(6), None, rules, seed=7, stop=StopFlag())


def test_answers_are_drawn_fewer_at_once_and_are_the_same(decoder: Decoder) -> None:
    expected, rules = draw(decoder, Drawing(**RULES)), Drawing(**RULES)
    with room_for(decoder, 8) as tried:
        assert draw(decoder, rules) == expected
        # Six prompts, three, one; and one each from then on.
        assert tried[:3] == [24, 12, 4]
        assert rules.at_once.samples == 1
        del tried[:]
        assert draw(decoder, rules) == expected
        assert max(tried) == 4


def test_memory_may_also_run_out_when_answers_have_grown(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, logits, calls = draw(decoder, Drawing(**RULES)), decoder.logits, [0]

    def fail_once(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits(*args)

    monkeypatch.setattr(decoder, "logits", fail_once)
    assert draw(decoder, Drawing(**RULES)) == expected
    assert calls[0] > 5 + 8


def test_an_answer_that_does_not_fit_alone_ends_the_job(decoder: Decoder) -> None:
    with room_for(decoder, 3), pytest.raises(MemoryTooSmallError, match="maxNewTokens where"):
        draw(decoder, Drawing(**RULES))


def test_ranks_that_draw_together_ask_for_a_start_with_fewer(decoder: Decoder) -> None:
    decoder.group = RankGroup(0, 2)
    with room_for(decoder, 8) as tried, pytest.raises(FewerAtOnce) as raised:
        draw(decoder, Drawing(**RULES))
    assert (raised.value.limit, raised.value.samples) == ("drawn", 3)
    assert tried == [24]
    with room_for(decoder, 3), pytest.raises(MemoryTooSmallError):
        draw(decoder, Drawing(**RULES, at_once=drawn_at_once(1)))


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def broken(*_: object) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        AtOnce(4).in_parts([1, 2], broken)


def test_what_is_known_of_answers_is_found_out_fewer_at_once(
    tmp_path: Path, decoder: Decoder
) -> None:
    job = write_job(
        tmp_path / "job",
        method="ppo",
        rl={"rewards": [{"type": "regex", "pattern": "[a-m]"}], "max_new_tokens": 8},
        datasets=[{"name": "questions", "path": str(write_prompts(tmp_path / "q.jsonl"))}],
        hyperparameters={"micro_batch": 6},
        evaluation={"suites": []},
    )
    config = load_config(job.config_path)

    def roll_out() -> list[tuple[np.ndarray, ...]]:
        method = Ppo(
            Surroundings(
                config=config,
                spec=ArchSpec.from_dir(config.base_model),
                tokenizer=Tokenizer.load(config.base_model),
                device=torch.device("cpu"),
                stop=StopFlag(),
            )
        )
        found = method.roll_out(decoder, prompts(6), None, seed=1)
        return [(r.sample.token_ids_T, r.old_N, r.reference_N, r.value_N) for r in found]

    expected = roll_out()
    with room_for(decoder, 12) as tried:
        for ours, theirs in zip(roll_out(), expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # Six answers of four and eight tokens, for the policy and for the reference: when the policy is
    # asked for its values it is known that six do not fit.
    assert sum(tokens > 48 for tokens in tried) == 2


def test_the_gate_asks_fewer_questions_at_once(tmp_path: Path, decoder: Decoder) -> None:
    suite = Suite(name="holdout", type="perplexity")
    holdout = [sample(10, seed) for seed in range(5)]

    def tally(name: str) -> tuple[int, float]:
        examination = Examination(
            exams=[MethodExam(suite, Sft(), holdout)],
            micro_batch=4,
            store=TallyStore(tmp_path / name, fingerprint="f"),
            stop=StopFlag(),
        )
        found = examination.tally("base", examination.exams[0], Subject(decoder=decoder), base=None)
        return found.samples, found.total

    expected = tally("roomy")
    with room_for(decoder, 10) as tried:
        found = tally("tight")
    assert tried == [40, 20, 10, 10, 10, 10, 10]
    assert found == (5, pytest.approx(expected[1]))


def test_a_frozen_model_is_asked_about_fewer_items_at_once(
    tmp_path: Path, decoder: Decoder
) -> None:
    pairs = tuple(Pair(sample(8, seed), sample(8, seed + 9), 0.0) for seed in range(4))
    data = Prepared(train=(pairs,), weights=(1.0,), holdout=(), truncated=0, dropped=0, digest="d")
    around: Any = type("Around", (), {"config": type("Config", (), {"dpo": None})})
    method = Dpo(around)

    def noted(name: str) -> list[float]:
        def ask(items: Sequence[Any], first: int) -> list[Any]:
            return method.ask(decoder, items, first=first)

        store = NoteStore(tmp_path / name, fingerprint="f")
        found = take_notes(data, method, store, ask=lambda: ask, at_once=AtOnce(4))
        return [pair.reference_margin for pair in found.train[0]]

    expected = noted("roomy")
    with room_for(decoder, 16) as tried:
        assert noted("tight") == pytest.approx(expected, rel=1e-4)
    assert tried == [64, 32, 16, 16, 16, 16]


WANTED = Limits(micro_batch=8, drawn=64)


def test_the_least_of_what_the_ranks_have_noted_counts(tmp_path: Path) -> None:
    store = FewerStore(tmp_path / "checkpoints", ranks=2)
    assert store.least(WANTED) == WANTED
    store.note(1, WANTED, FewerAtOnce("micro_batch", 4))
    store.note(0, WANTED, FewerAtOnce("drawn", 32))
    assert store.least(WANTED) == Limits(micro_batch=4, drawn=32)
    store.note(1, store.least(WANTED), FewerAtOnce("micro_batch", 2))
    assert store.least(WANTED) == Limits(micro_batch=2, drawn=32)
    assert store.least(Limits(micro_batch=1, drawn=16)) == Limits(micro_batch=1, drawn=16)


def test_another_number_of_ranks_has_other_room(tmp_path: Path) -> None:
    FewerStore(tmp_path, ranks=2).note(0, WANTED, FewerAtOnce("micro_batch", 4))
    assert FewerStore(tmp_path, ranks=4).least(WANTED) == WANTED


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"ranks": 2, "micro_batch": "x"}'])
def test_a_damaged_note_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "at-once-0.json").write_bytes(content)
    assert FewerStore(tmp_path, ranks=2).least(WANTED) == WANTED


def test_a_note_for_which_there_is_no_room_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fewer, "write_durably", full)
    with pytest.raises(StorageFullError, match="How many samples run at once cannot be written"):
        FewerStore(tmp_path, ranks=2).note(0, WANTED, FewerAtOnce("micro_batch", 4))


def test_a_job_keeps_its_checkpoints_with_fewer_samples_at_once(tmp_path: Path) -> None:
    config = load_config(write_job(tmp_path).config_path)
    fewer_at_once = Limits(micro_batch=1).applied_to(config)
    assert fewer_at_once.hyperparameters.micro_batch == 1
    assert fingerprint(fewer_at_once, None) == fingerprint(config, None)
