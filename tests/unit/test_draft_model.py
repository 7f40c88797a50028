"""A draft model's guesses: never another answer, only fewer steps."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from mizzen.runtime.engine.api import GenerationRequest, SamplingParams
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.draft import DraftUnfitError
from mizzen.runtime.engine.engine import Engine
from tests.fixtures.engine_models import generate, save_served_llama, tiny_config
from tests.fixtures.runtime_server import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOM_GIB = 0.0005  # less than four long answers need, so that some are preempted


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_served_llama(folder)
    return folder


@pytest.fixture(scope="module")
def draft(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that often agrees with the served one, and often does not."""
    folder = tmp_path_factory.mktemp("draft")
    save_served_llama(folder)
    file = folder / "model.safetensors"
    torch.manual_seed(1)
    near = {k: t + 0.02 * torch.randn_like(t) for k, t in load_file(file).items()}
    save_file(near, file, metadata={"format": "pt"})
    return folder


def drafting(served: Path, draft: Path, **options: Any) -> EngineConfig:
    return tiny_config(served, speculative_model=draft, speculative_tokens=3, **options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(served: Path, draft: Path) -> AsyncIterator[list[Engine]]:
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 48}
    started = [  # with equal numbers of blocks
        Engine.start(tiny_config(served, kv_cache_gib=ROOM_GIB / 2, **options)),
        Engine.start(drafting(served, draft, kv_cache_gib=ROOM_GIB, **options)),
    ]
    yield started
    for engine in started:
        await engine.stop()


def mixed_requests(seed: int, count: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Return prompts, some of which begin alike, and ways to sample."""
    chance = random.Random(seed)
    shared = [chance.randrange(256) for _ in range(70)]
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "seed": 5},
        {"temperature": 1.0, "top_p": 0.8, "seed": 6, "logprobs": 1},
        {"presence_penalty": 0.5},
    ]
    requests = []
    for _ in range(count):
        tail = [chance.randrange(256) for _ in range(chance.randrange(1, 40))]
        prompt = shared[: chance.choice((0, 33, 70))] + tail
        options = {**chance.choice(kinds), "max_tokens": chance.choice((1, 9, 140))}
        requests.append((prompt, options))
    return requests


async def test_answers_are_those_without_guesses_in_fewer_steps(engines: list[Engine]) -> None:
    requests = mixed_requests(0, 14)
    answers = [
        await asyncio.gather(
            *(
                generate(engine, prompt, request_id=str(i), **options)
                for i, (prompt, options) in enumerate(requests)
            )
        )
        for engine in engines
    ]
    assert answers[1] == answers[0]
    plain, drafted = (engine.stats() for engine in engines)
    assert 0 < drafted.accepted_tokens < drafted.draft_tokens
    assert plain.draft_tokens == 0
    assert drafted.steps < plain.steps
    assert drafted.preemptions > 0 and drafted.prefix_hits > 0
    for engine in engines:
        engine._loop.scheduler.check()


async def test_most_guesses_of_the_same_model_are_right(served: Path) -> None:
    engine = Engine.start(drafting(served, served, kv_cache_gib=ROOM_GIB * 3))
    try:
        await generate(engine, [1, 2, 3], max_tokens=41)
        again = await generate(engine, [1, 2, 3] * 20, request_id="long", max_tokens=40)
        first = engine.stats()
        # The first answer's blocks are found by the second request, with the draft model's keys.
        hit = await generate(engine, [1, 2, 3] * 20, request_id="hit", max_tokens=40)
        assert hit == again
        stats = engine.stats()
        assert stats.prefix_hits == first.prefix_hits + 48
        # 1 + 3 tokens a step; all guesses are right but those beyond the last token.
        assert stats.steps - first.steps <= 12
        assert stats.accepted_tokens == stats.draft_tokens
    finally:
        await engine.stop()


async def test_an_aborted_request_leaves_nothing_behind(engines: list[Engine]) -> None:
    engine = engines[1]
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=150)
    outputs = engine.generate(
        GenerationRequest(request_id="gone", prompt_token_ids=(9,) * 30, sampling=sampling)
    )
    await anext(outputs)
    await outputs.aclose()
    expected = await generate(engines[0], [9] * 31, max_tokens=20)
    assert await generate(engine, [9] * 31, max_tokens=20) == expected
    await eventually(lambda: engine.in_flight() == 0)
    engine._loop.scheduler.check()


async def test_it_sleeps_and_wakes_with_the_served_model(engines: list[Engine]) -> None:
    engine = engines[1]
    before = await generate(engine, [4, 5, 6], max_tokens=12)
    runner = engine._ranks._draft._runner
    await engine.sleep(10)
    assert runner._decoder is None and runner._cache is None
    await engine.wake()
    accepted = engine.stats().accepted_tokens
    assert await generate(engine, [4, 5, 6], max_tokens=12) == before
    assert engine.stats().accepted_tokens > accepted


async def test_another_vocabulary_is_refused_with_both_sizes(served: Path, tmp_path: Path) -> None:
    save_served_llama(tmp_path, vocab_size=300)
    with pytest.raises(DraftUnfitError, match=r"knows 300 tokens and the served one 258\."):
        Engine.start(drafting(served, tmp_path))


async def test_a_shorter_context_is_refused(served: Path, tmp_path: Path) -> None:
    save_served_llama(tmp_path, max_position_embeddings=128)
    with pytest.raises(DraftUnfitError, match="maximum model length to at most 128"):
        Engine.start(drafting(served, tmp_path))
    engine = Engine.start(drafting(served, tmp_path, max_model_len=128))
    await engine.stop()


async def test_a_draft_model_with_nothing_to_guess_is_refused(served: Path) -> None:
    with pytest.raises(DraftUnfitError, match="Set --speculative-tokens"):
        Engine.start(tiny_config(served, speculative_model=served))
