"""What the engine generates, held against transformers on the same weights."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from mizzen.runtime.engine.api import GenerationRequest, SamplingParams
from mizzen.runtime.engine.engine import Engine
from tests.fixtures.engine_models import (
    EOS,
    collect,
    generate,
    greedy_reference,
    save_served_llama,
    tiny_config,
)

OUT = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("model")
    return path, save_served_llama(path)


@pytest.fixture(scope="module")
def engine(checkpoint: tuple[Path, PreTrainedModel]) -> Iterator[Engine]:
    started = Engine.start(tiny_config(checkpoint[0], max_num_seqs=8, max_num_batched_tokens=64))
    yield started
    asyncio.run(started.stop())


def random_prompts(lengths: list[int], *, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


SETTINGS = {
    "in one step": {"max_num_batched_tokens": 512},
    "prompts cut into chunks": {"max_num_batched_tokens": 13},
    "one after the other": {"max_num_seqs": 1},
    "few blocks, so that sequences are preempted": {"kv_cache_gib": 0.00014},
    "without a prefix cache": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
async def test_greedy_output_is_that_of_transformers(
    checkpoint: tuple[Path, PreTrainedModel], settings: dict
) -> None:
    path, model = checkpoint
    prompts = random_prompts([1, 5, 16, 17, 33, 50, 64])
    prompts += [prompts[-1], [*prompts[-1][:32], 7], prompts[2]]  # prefixes are shared
    options = {"max_num_seqs": 6, "max_model_len": 128, **settings}
    engine = Engine.start(tiny_config(path, **options))
    try:
        for _ in range(2):  # the second time every prompt is in the cache
            got = await asyncio.gather(
                *(
                    generate(engine, prompt, request_id=str(i), max_tokens=OUT)
                    for i, prompt in enumerate(prompts)
                )
            )
            assert got == [greedy_reference(model, prompt, OUT) for prompt in prompts]
        engine._loop.scheduler.check()
        stats = engine.stats()
        assert (stats.prefix_hits > 0) == settings.get("enable_prefix_caching", True)
        assert (stats.preemptions > 0) == ("kv_cache_gib" in settings)
        assert stats.generation_tokens == 2 * len(prompts) * OUT
    finally:
        await engine.stop()


async def test_two_ranks_generate_what_one_rank_does(
    checkpoint: tuple[Path, PreTrainedModel],
) -> None:
    path, model = checkpoint
    engine = Engine.start(
        tiny_config(path, tensor_parallel_size=2, max_num_seqs=4, max_num_batched_tokens=16)
    )
    try:
        prompts = random_prompts([3, 40, 17])
        got = await asyncio.gather(
            *(generate(engine, p, request_id=str(i), max_tokens=8) for i, p in enumerate(prompts))
        )
        assert got == [greedy_reference(model, prompt, 8) for prompt in prompts]
    finally:
        await engine.stop()


async def test_a_seed_gives_the_same_answer_alone_and_in_company(engine: Engine) -> None:
    prompt, *others = random_prompts([20, 3, 9, 31], seed=1)
    drawn = {"temperature": 1.0, "top_p": 0.9, "max_tokens": OUT}
    alone = await generate(engine, prompt, seed=11, **drawn)
    together = await asyncio.gather(
        generate(engine, prompt, seed=11, **drawn),
        *(
            generate(engine, other, request_id=str(i), seed=i, **drawn)
            for i, other in enumerate(others)
        ),
    )
    assert together[0] == alone
    assert await generate(engine, prompt, seed=12, **drawn) != alone


async def test_logprobs_are_those_of_transformers(
    engine: Engine, checkpoint: tuple[Path, PreTrainedModel]
) -> None:
    prompt = random_prompts([12], seed=2)[0]
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=2, ignore_eos=True)
    request = GenerationRequest(request_id="r", prompt_token_ids=tuple(prompt), sampling=sampling)
    outputs = await collect(engine, request)
    tokens = [token for output in outputs for token in output.token_ids]
    with torch.inference_mode():
        logits = checkpoint[1](torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for index, output in enumerate(outputs):
        (entry,) = output.logprobs
        assert entry.token_id == tokens[index]
        assert entry.logprob == pytest.approx(float(expected[index].max()), abs=1e-3)
        best = expected[index].topk(2)
        assert [token for token, _ in entry.top] == best.indices.tolist()


async def test_an_answer_ends_where_it_should(engine: Engine) -> None:
    prompt = random_prompts([10], seed=3)[0]
    tokens = await generate(engine, prompt, max_tokens=OUT)
    text = engine.tokenizer.decode(tokens)

    async def ending(**options: object) -> tuple[str, str | None, object, int]:
        sampling = SamplingParams(**{"temperature": 0, "ignore_eos": True, **options})
        request = GenerationRequest(
            request_id="r", prompt_token_ids=tuple(prompt), sampling=sampling
        )
        outputs = await collect(engine, request)
        last = outputs[-1]
        joined = "".join(output.text for output in outputs)
        return joined, last.finish_reason, last.stop_reason, last.output_tokens

    assert await ending(max_tokens=5) == (
        engine.tokenizer.decode(tokens[:5]), "length", None, 5,
    )  # fmt: skip
    first = tokens.index(tokens[7])
    stopped = await ending(max_tokens=OUT, stop_token_ids=(tokens[7],))
    assert stopped == (
        engine.tokenizer.decode(tokens[:first]), "stop", tokens[7], first + 1,
    )  # fmt: skip
    stop = next(text[i : i + 2] for i in range(4, 20) if text[i : i + 2].isprintable())
    joined, reason, found, _ = await ending(max_tokens=OUT, stop=(stop,))
    assert (joined, reason, found) == (text[: text.index(stop)], "stop", stop)
    bias = {EOS: 100.0}
    assert await ending(logit_bias=bias, ignore_eos=False, max_tokens=9) == ("", "stop", None, 1)
    assert (await ending(logit_bias=bias, ignore_eos=False, max_tokens=9, min_tokens=4))[3] == 5
    assert (await ending(logit_bias=bias, max_tokens=9))[1:] == ("length", None, 9)


async def test_an_answer_fills_the_context_and_no_more(engine: Engine) -> None:
    prompt = random_prompts([250], seed=4)[0]
    tokens = await generate(engine, prompt)
    assert len(prompt) + len(tokens) == engine.model_len == 256
