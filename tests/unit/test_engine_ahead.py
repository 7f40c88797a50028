"""The loop one step ahead says what it says without, however a sequence ends meanwhile."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mizzen.runtime.engine.batch import StepInput
from mizzen.runtime.engine.errors import GenerationFailedError
from mizzen.runtime.engine.sequence import Sequence, State
from tests.fixtures.engine_models import save_served_llama
from tests.fixtures.rank_work import random_tokens
from tests.fixtures.stepped_loop import SteppedLoop, stepped

TOKENS = random_tokens(250, 300).tolist()
PROMPT = TOKENS[:21]
OUT = 14


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_served_llama(path)
    return path


@pytest.fixture
def ahead(model: Path) -> Iterator[SteppedLoop]:
    with stepped(model, is_ahead=True) as loop:
        yield loop


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """Return what follows `PROMPT`, one step after the other."""
    with stepped(model, is_ahead=False) as loop:
        seq = loop.add(PROMPT, max_tokens=OUT)
        loop.run()
        return loop.tokens(seq)


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 3},
    "drawn among the best": {"temperature": 0.9, "top_p": 0.7, "seed": 4},
    "with penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5},
    "not before its fifth token": {"min_tokens": 5, "ignore_eos": False},
    "with log probabilities": {"logprobs": 2},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "with room": {},
    "in small chunks": {"max_num_batched_tokens": 9, "max_num_seqs": 6},
    "preempted for want of blocks": {"kv_cache_gib": 0.00014, "max_model_len": 100},
}


def say_all(loop: SteppedLoop, kinds: list[dict[str, Any]]) -> list[list[int]]:
    prompts = [TOKENS[20 * i : 20 * i + 5 + 9 * i] for i in range(len(kinds))]
    sequences: list[Sequence] = []
    for prompt, kind in zip(prompts, kinds, strict=True):
        sequences.append(loop.add(prompt, max_tokens=34 + len(sequences), **kind))
        loop.turn()  # they come while others are in flight
    loop.run()
    return [loop.tokens(seq) for seq in sequences]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kinds", [[{}] * 6, list(KINDS.values())], ids=["plain", "of all kinds"])
def test_the_tokens_are_those_of_one_step_after_the_other(
    model: Path, kinds: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    said = []
    for is_ahead in (False, True):
        with stepped(model, is_ahead=is_ahead, **settings) as loop:
            said.append(say_all(loop, kinds))
            assert (loop.scheduler.preemptions > 0) == ("kv_cache_gib" in settings)
    assert said[0] == said[1]


def test_two_ranks_are_told_the_tokens_that_were_not_known(
    model: Path, expected: list[int]
) -> None:
    with stepped(model, is_ahead=True, tensor_parallel_size=2) as loop:
        seq = loop.add(PROMPT, max_tokens=OUT)
        loop.turn(3)
        assert loop.is_flying(seq)
        loop.run()
        assert loop.tokens(seq) == expected


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_only_plain_choices_are_launched_with_tokens_unknown(
    ahead: SteppedLoop, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, unknown = ahead.parts.ranks.run, []

    def counting(step: StepInput, before_N: Tensor | None) -> Tensor | None:
        unknown.append(len(step.unknown_at_M))
        return run(step, before_N)

    monkeypatch.setattr(ahead.parts.ranks, "run", counting)
    ahead.add(PROMPT, max_tokens=5, **kind)
    ahead.run()
    is_plain = kind in (KINDS["greedy"], KINDS["drawn"])
    assert unknown == [0, *([1] * 4 if is_plain else [0] * 4)]


def test_the_last_of_its_tokens_leaves_no_place_too_many(ahead: SteppedLoop) -> None:
    seq = ahead.add(PROMPT, max_tokens=3)
    ahead.run()
    assert len(ahead.tokens(seq)) == 3
    assert ahead.loop.steps == 3


def end_of_text(loop: SteppedLoop, said: list[int]) -> Sequence:
    return loop.add(PROMPT, max_tokens=OUT, stop_token_ids=(said[4],))


def stop_string(loop: SteppedLoop, said: list[int]) -> Sequence:
    text = loop.parts.tokenizer.decode(said[4:6])
    return loop.add(PROMPT, max_tokens=OUT, stop=(text,))


def cancelled(loop: SteppedLoop, said: list[int]) -> Sequence:
    seq = loop.add(PROMPT, max_tokens=OUT)
    loop.turn(4)
    loop.loop.abort(seq.request_id)
    return seq


ENDINGS: dict[str, tuple[Callable[[SteppedLoop, list[int]], Sequence], str]] = {
    "an end token": (end_of_text, "stop"),
    "a stop string": (stop_string, "stop"),
    "a client that leaves": (cancelled, "abort"),
}


@pytest.mark.parametrize(("begin", "reason"), ENDINGS.values(), ids=ENDINGS)
def test_a_sequence_ended_by(
    ahead: SteppedLoop,
    expected: list[int],
    begin: Callable[[SteppedLoop, list[int]], Sequence],
    reason: str,
) -> None:
    """Its extra place is dropped, its blocks stay until the step in flight has landed."""
    neighbour = ahead.add(PROMPT[::-1], max_tokens=30)
    seq = begin(ahead, expected)
    while seq.state is not State.FINISHED:
        ahead.turn()
    tokens = ahead.tokens(seq)
    assert ahead.outputs(seq)[-1].finish_reason == reason
    assert tokens == expected[: len(tokens)] and 3 <= len(tokens) < OUT
    if reason == "stop":
        assert ahead.is_flying(seq)
        assert seq.computing == 1 and seq.blocks and seq.row >= 0
        ahead.turn()
    assert seq.blocks == [] and seq.computing == 0
    assert ahead.tokens(seq) == tokens
    ahead.run()
    assert len(ahead.tokens(neighbour)) == 30
    assert ahead.scheduler.pool.used == 0


def test_its_neighbours_and_successors_are_not_disturbed_by_an_end(
    ahead: SteppedLoop, expected: list[int]
) -> None:
    first = ahead.add(TOKENS[100:140], max_tokens=30)
    end_of_text(ahead, expected)
    second = ahead.add(PROMPT, max_tokens=OUT)
    ahead.run()
    third = ahead.add(PROMPT, max_tokens=OUT)  # finds what the others have left in the cache
    ahead.run()
    assert ahead.scheduler.prefix_hits > 0
    assert ahead.tokens(second) == ahead.tokens(third) == expected
    assert len(ahead.tokens(first)) == 30


def test_one_that_waits_for_the_blocks_of_ended_ones_gets_them_when_those_have_landed(
    model: Path,
) -> None:
    with stepped(model, is_ahead=True, kv_cache_gib=0.00014, max_model_len=100) as loop:
        full = [loop.add(TOKENS[60 * i : 60 * i + 80], max_tokens=12) for i in range(3)]
        loop.turn(3)
        assert loop.scheduler.pool.free == 0
        waiting = loop.add(TOKENS[200:290], max_tokens=2)
        for seq in full:
            loop.loop.abort(seq.request_id)
        loop.turn()
        assert not loop.scheduler.running and waiting.state is State.WAITING
        loop.run()
        assert len(loop.tokens(waiting)) == 2


def test_calls_between_steps_find_nothing_in_flight(
    ahead: SteppedLoop, model: Path, expected: list[int]
) -> None:
    seq = ahead.add(PROMPT, max_tokens=OUT)
    ahead.turn(4)
    assert ahead.is_flying(seq)
    found = []

    def swap() -> None:
        found.append(ahead.loop._flight)
        ahead.parts.ranks.swap(ahead.parts.ranks.prepare(model))

    called = ahead.loop.call_between_steps(swap)
    ahead.run()
    assert called.result() is None and found == [None]
    assert ahead.tokens(seq) == expected  # the new weights are equal ones


def test_numbers_that_overflow_in_flight_end_their_request_alone(
    ahead: SteppedLoop, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seq, other = ahead.add(TOKENS[40:60]), ahead.add(PROMPT, max_tokens=OUT)
    ahead.turn(3)
    run, broken = ahead.parts.ranks.run, []

    def run_broken(step: StepInput, before_N: Tensor | None) -> Tensor | None:
        logits_NV = run(step, before_N)
        assert logits_NV is not None
        if not broken:
            broken.append(True)
            logits_NV = logits_NV.clone()
            logits_NV[0] = torch.nan
        return logits_NV

    monkeypatch.setattr(ahead.parts.ranks, "run", run_broken)
    ahead.turn(2)
    assert seq.state is State.FINISHED and ahead.is_flying(seq)
    with pytest.raises(GenerationFailedError, match="overflowed"):
        ahead.outputs(seq)
    ahead.run()
    assert ahead.tokens(other) == expected


def test_an_embedding_is_the_same_beside_sequences_in_flight(ahead: SteppedLoop) -> None:
    alone = ahead.add(PROMPT, max_tokens=1, embed=True)
    ahead.run()
    ahead.add(TOKENS[50:90], max_tokens=20)
    ahead.turn(3)
    beside = ahead.add(PROMPT, max_tokens=1, embed=True)
    ahead.run()
    vectors = [torch.tensor(ahead.outputs(seq)[-1].embedding) for seq in (alone, beside)]
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-5, rtol=1e-5)
