"""An engine whose model is cut into stages does all that one with a whole model does."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import PreTrainedModel

from mizzen.runtime.engine.api import GenerationRequest, SamplingParams, ScoreRequest
from mizzen.runtime.engine.engine import Engine
from mizzen.runtime.engine.errors import EngineDeadError
from mizzen.runtime.engine.kv_room import KvCacheTooSmallError
from mizzen.runtime.errors import EXIT_RANK_LOST, PipelineInvalidError, RankLostError
from tests.fixtures.engine_models import (
    assert_scores_of,
    collect,
    generate,
    greedy_reference,
    save_random_adapter,
    save_served_llama,
    tiny_config,
)
from tests.fixtures.rank_work import random_tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = list(range(30, 70))
OUT = 12
LAYER_BYTES = 2 * 2 * 16 * 4 * 16  # of a block: sides, heads, width, bytes of a number, tokens
ROOM_BYTES = int(0.02 * (1 << 30)) // 2  # as `tiny_config` has it, for each of two ranks
STAGES = {"pipeline_parallel_size": 2, "max_num_seqs": 4, "max_num_batched_tokens": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    """Three layers, so that the stages differ, and a table that both ends hold."""
    return save_served_llama(folder, num_hidden_layers=3, tie_word_embeddings=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path, model: PreTrainedModel) -> AsyncIterator[Engine]:
    started = Engine.start(tiny_config(folder, **STAGES))
    yield started
    await started.stop()


async def test_answers_are_those_of_transformers_in_chunks_batches_and_from_the_cache(
    engine: Engine, model: PreTrainedModel
) -> None:
    tokens = random_tokens(256, 130).tolist()
    prompts = [tokens[:1], tokens[1:34], tokens[34:100], [*tokens[34:82], 7]]
    for _ in range(2):  # the second time every prompt is in the cache
        answers = await asyncio.gather(
            *(
                generate(engine, prompt, request_id=str(i), max_tokens=OUT)
                for i, prompt in enumerate(prompts)
            )
        )
        assert answers == [greedy_reference(model, prompt, OUT) for prompt in prompts]
    assert engine.stats().prefix_hits > 0
    engine._loop.scheduler.check()


async def test_the_stage_with_the_most_layers_decides_how_many_blocks_there_are(
    engine: Engine,
) -> None:
    assert engine.stats().blocks_total == ROOM_BYTES // (2 * LAYER_BYTES)


async def test_an_embedding_is_the_last_stages_hidden_state(
    engine: Engine, model: PreTrainedModel
) -> None:
    request = GenerationRequest(
        request_id="e",
        prompt_token_ids=tuple(PROMPT),
        sampling=SamplingParams(max_tokens=1, embed=True),
    )
    found = (await collect(engine, request))[-1].embedding
    with torch.inference_mode():
        expected = model.model(torch.tensor([PROMPT])).last_hidden_state[0, -1]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)


async def test_an_adapter_changes_the_layers_of_every_stage(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    expected = greedy_reference(save_random_adapter(folder, tmp_path, seed=1), PROMPT, OUT)
    base = await generate(engine, PROMPT, max_tokens=OUT)
    await engine.load_adapter("a", tmp_path)
    answers = await asyncio.gather(
        generate(engine, PROMPT, request_id="with", adapter="a", max_tokens=OUT),
        generate(engine, PROMPT, request_id="without", max_tokens=OUT),
    )
    assert answers == [expected, base]
    assert base != expected
    await engine.unload_adapter("a")


async def test_all_stages_sleep_wake_and_change_their_weights_together(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    before = await generate(engine, PROMPT, max_tokens=OUT)
    await engine.sleep(60)
    await engine.wake()
    assert await generate(engine, PROMPT, max_tokens=OUT) == before
    other = save_served_llama(tmp_path, num_hidden_layers=3, tie_word_embeddings=True, seed=3)
    await engine.load_weights(tmp_path)
    changed = await generate(engine, PROMPT, max_tokens=OUT)
    assert changed == greedy_reference(other, PROMPT, OUT) != before
    await engine.load_weights(folder)
    assert await generate(engine, PROMPT, max_tokens=OUT) == before


async def test_scores_are_those_of_transformers(engine: Engine, model: PreTrainedModel) -> None:
    scores = await engine.score(ScoreRequest(token_ids=tuple(PROMPT), alternatives=3))
    assert_scores_of(scores, model, PROMPT)


async def test_quantized_stages_answer_as_the_quantized_whole(folder: Path, model: object) -> None:
    answers = []
    for spread in ({}, STAGES):
        engine = Engine.start(tiny_config(folder, quantization="int8", **spread))
        try:
            answers.append(await generate(engine, PROMPT, max_tokens=OUT))
        finally:
            await engine.stop()
    assert answers[0] == answers[1]


async def test_a_draft_model_guesses_for_all_stages(folder: Path, model: PreTrainedModel) -> None:
    guessing = {"speculative_model": folder, "speculative_tokens": 2}
    engine = Engine.start(tiny_config(folder, **STAGES, **guessing))
    try:
        answer = await generate(engine, PROMPT, max_tokens=OUT)
        assert answer == greedy_reference(model, PROMPT, OUT)
        assert engine.stats().accepted_tokens > 0
        # Rank 0 has one layer of the model, and beside it the draft model's three.
        assert engine.stats().blocks_total == ROOM_BYTES // (4 * LAYER_BYTES)
    finally:
        await engine.stop()


async def test_a_killed_stage_takes_the_group_down_and_every_request_hears_of_it(
    folder: Path, model: object
) -> None:
    engine = Engine.start(tiny_config(folder, pipeline_parallel_size=3))
    try:
        begun = asyncio.Event()
        ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

        def deliver(item: object) -> None:
            begun.set()
            if isinstance(item, Exception):
                ended.set_result(item)

        request = GenerationRequest(
            request_id="r",
            prompt_token_ids=tuple(PROMPT[:3]),
            sampling=SamplingParams(temperature=0, ignore_eos=True),
        )
        await engine.submit(request, deliver)
        await begun.wait()
        os.kill(engine._ranks._ranks.pids[0], signal.SIGKILL)  # the stage in the middle
        assert isinstance(await asyncio.wait_for(ended, 300), EngineDeadError)
        death = engine.death()
        assert isinstance(death, RankLostError)
        assert death.exit_code == EXIT_RANK_LOST
    finally:
        await engine.stop()


async def test_a_cache_that_one_stage_has_no_room_for_is_refused(
    folder: Path, model: object
) -> None:
    with pytest.raises(KvCacheTooSmallError, match="holds 192 tokens and the context 256"):
        # Room for 24 blocks with one layer, for 12 with two, and 16 are needed.
        Engine.start(tiny_config(folder, **{**STAGES, "kv_cache_gib": 2 * 1e5 / (1 << 30)}))


async def test_more_stages_than_layers_are_refused(folder: Path, model: object) -> None:
    with pytest.raises(PipelineInvalidError, match=r"3 layers .* 4 stages.* to at most 3"):
        Engine.start(tiny_config(folder, pipeline_parallel_size=4))
