"""Guessed tokens: never another answer, only fewer steps."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from transformers import PreTrainedModel

from mizzen.runtime.engine.engine import Engine
from mizzen.runtime.engine.speculation import NgramIndex
from tests.fixtures.engine_models import (
    EOS,
    generate,
    greedy_reference,
    save_served_llama,
    tiny_config,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

REPEATED = [65, 66, 67, 68, 69, 70] * 6
OTHER = list(range(30, 60))
OUT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return save_served_llama(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(folder: Path, model: PreTrainedModel) -> AsyncIterator[list[Engine]]:
    started = [
        Engine.start(tiny_config(folder, max_num_seqs=4, speculative_tokens=count))
        for count in (0, 4)
    ]
    yield started
    for engine in started:
        await engine.stop()


async def test_an_index_proposes_what_followed_last() -> None:
    index = NgramIndex()
    assert index.propose([1, 2, 3], 4) == []
    assert index.propose([1, 2, 3, 9, 8, 1, 2, 3], 4) == [9, 8, 1, 2]
    assert index.propose([1, 2, 3, 9, 8, 1, 2, 3, 7, 1, 2, 3], 2) == [7, 1]
    assert index.propose([1, 2, 3, 9, 8, 1, 2, 3, 7, 1, 2, 3, 5], 2) == []


class Oracle:
    """Guesses the true continuation, with a mistake at each place that is a multiple of 5."""

    def __init__(self, truth: list[int]) -> None:
        self.truth = truth

    def __call__(self, index: NgramIndex, token_ids: list[int], count: int) -> list[int]:
        begin = len(token_ids)
        right = self.truth[begin : begin + count]
        return [(t + 1) % 250 if (begin + i) % 5 == 0 else t for i, t in enumerate(right)]


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    oracle = Oracle([])
    monkeypatch.setattr(NgramIndex, "propose", lambda *arguments: oracle(*arguments))
    return oracle


async def test_greedy_answers_are_those_of_transformers_in_fewer_steps(
    engines: list[Engine], model: PreTrainedModel, oracle: Oracle
) -> None:
    engine = engines[1]
    steps = engine.stats().steps
    for prompt in (REPEATED, OTHER, REPEATED):  # the third time from the prefix cache
        expected = greedy_reference(model, prompt, OUT)
        oracle.truth = prompt + expected
        assert await generate(engine, prompt, max_tokens=OUT) == expected
    stats = engine.stats()
    assert stats.prefix_hits > 0
    assert OUT < stats.accepted_tokens < stats.draft_tokens
    assert stats.steps - steps == 3 * OUT - stats.accepted_tokens
    # What guesses computed is found by whoever begins alike, and is what it would have computed.
    longer = prompt + expected
    again = await generate(engine, longer, max_tokens=8)
    assert again == greedy_reference(model, longer, 8)
    engine._loop.scheduler.check()


async def test_a_seed_draws_what_it_draws_without_guesses(
    engines: list[Engine], oracle: Oracle
) -> None:
    for kind in ({"temperature": 0.3}, {"temperature": 0.9, "top_p": 0.8, "logprobs": 2}):
        plain = await generate(engines[0], REPEATED, seed=11, max_tokens=OUT, **kind)
        oracle.truth = REPEATED + plain
        before = engines[1].stats().accepted_tokens
        assert await generate(engines[1], REPEATED, seed=11, max_tokens=OUT, **kind) == plain
        assert engines[1].stats().accepted_tokens > before + OUT // 3


async def test_company_penalties_and_ends_change_nothing(
    engines: list[Engine], model: PreTrainedModel, oracle: Oracle
) -> None:
    oracle.truth = REPEATED + greedy_reference(model, REPEATED, 200)  # right for the first only
    kinds = [
        {"max_tokens": OUT},
        {"max_tokens": OUT, "presence_penalty": 1.0},
        {"max_tokens": 7},
        {"max_tokens": 200, "stop_token_ids": tuple(range(0, 256, 9))},
        {"max_tokens": OUT, "temperature": 1, "seed": 5, "ignore_eos": False},
    ]
    answers = [
        await asyncio.gather(
            *(generate(e, REPEATED[i:], request_id=str(i), **k) for i, k in enumerate(kinds))
        )
        for e in engines
    ]
    assert answers[0] == answers[1]
    assert len(answers[1][2]) == 7
    assert EOS not in answers[1][4][:-1]
    for engine in engines:
        engine._loop.scheduler.check()
        assert engine.stats().generation_tokens > 0


async def test_a_cache_nearly_full_guesses_less_and_loses_nothing(
    folder: Path, model: PreTrainedModel, oracle: Oracle
) -> None:
    config = tiny_config(folder, max_num_seqs=3, speculative_tokens=4, kv_cache_gib=0.0003)
    engine = Engine.start(config)
    try:
        alone = greedy_reference(model, REPEATED, 215)
        oracle.truth = REPEATED + alone
        answers = await asyncio.gather(
            *(
                generate(engine, REPEATED, request_id=str(i), cache_salt=str(i), max_tokens=215)
                for i in range(3)
            )
        )
        assert answers == [alone] * 3
        stats = engine.stats()
        assert stats.preemptions > 0 and stats.accepted_tokens > 0
        engine._loop.scheduler.check()
    finally:
        await engine.stop()
