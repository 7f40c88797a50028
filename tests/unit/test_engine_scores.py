"""What the model thinks of given tokens, computed while no request wants it."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import PreTrainedModel

from mizzen.runtime.engine import engine as engine_module
from mizzen.runtime.engine.api import ScoreRequest
from mizzen.runtime.engine.engine import Engine
from mizzen.runtime.engine.errors import (
    EngineBusyError,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownAdapterError,
)
from mizzen.runtime.engine.idle import MAX_WAITING, IdleQueue, Interrupted, InterruptibleAttention
from tests.fixtures.engine_models import generate, save_served_llama, tiny_config
from tests.fixtures.runtime_server import Running, running_tiny_model

PROMPT = tuple(range(40, 70))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("model")
    return path, save_served_llama(path)


@pytest.fixture(scope="module")
def engine(checkpoint: tuple[Path, PreTrainedModel]) -> Iterator[Engine]:
    started = Engine.start(tiny_config(checkpoint[0]))
    yield started
    asyncio.run(started.stop())


class UntilWanted:
    """A slice that would never end, were nobody to ask."""

    def __init__(self) -> None:
        self.began, self.given_up = threading.Event(), 0
        self.is_over = False

    def do_slice(self, is_wanted: Callable[[], bool]) -> bool:
        self.began.set()
        while not is_wanted():
            if self.is_over:
                return False
            time.sleep(0.001)
        self.given_up += 1
        raise Interrupted

    def fail(self, error: Exception) -> None:
        self.error = error


async def test_scores_are_those_of_transformers(
    engine: Engine, checkpoint: tuple[Path, PreTrainedModel]
) -> None:
    scores = await engine.score(ScoreRequest(token_ids=PROMPT, alternatives=3))
    with torch.inference_mode():
        log_probs_TV = checkpoint[1](torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert [entry.token_id for entry in scores.logprobs] == list(PROMPT[1:])
    wanted = [log_probs_TV[at, token].item() for at, token in enumerate(PROMPT[1:])]
    assert [entry.logprob for entry in scores.logprobs] == pytest.approx(wanted, abs=1e-4)
    best = log_probs_TV[:-1].topk(3).indices.tolist()
    assert [[token for token, _ in entry.top] for entry in scores.logprobs] == best
    assert scores.drawn == ()


async def test_drawn_ids_follow_the_models_distribution_and_repeat_with_the_seed(
    engine: Engine, checkpoint: tuple[Path, PreTrainedModel]
) -> None:
    asked = ScoreRequest(token_ids=PROMPT, samples=1024, seed=3)
    scores = await engine.score(asked)
    with torch.inference_mode():
        wanted_NV = checkpoint[1](torch.tensor([PROMPT])).logits[0, :-1].softmax(-1)
    drawn_NK = torch.tensor(scores.drawn)
    found_NV = torch.nn.functional.one_hot(drawn_NK, wanted_NV.shape[1]).float().mean(1)
    assert drawn_NK.shape == (len(PROMPT) - 1, 1024)
    torch.testing.assert_close(found_NV, wanted_NV, atol=0.04, rtol=0.0)
    assert (await engine.score(asked)).drawn == scores.drawn


async def test_a_request_is_answered_though_a_slice_would_never_end(engine: Engine) -> None:
    work = UntilWanted()
    engine._loop.add_idle(work)
    try:
        await asyncio.to_thread(work.began.wait)
        assert len(await generate(engine, [1, 2, 3], max_tokens=4)) == 4
        assert work.given_up >= 1
    finally:
        work.is_over = True
        engine._loop.remove_idle(work)
    # The queue turns again: what was given up does not hold up what comes after it.
    assert len((await engine.score(ScoreRequest(token_ids=PROMPT))).logprobs) == len(PROMPT) - 1


async def test_work_is_done_in_turns(engine: Engine) -> None:
    class Endless(UntilWanted):
        def do_slice(self, is_wanted: Callable[[], bool]) -> bool:
            self.began.set()
            return True

    work = Endless()
    engine._loop.add_idle(work)
    try:
        await asyncio.to_thread(work.began.wait)
        assert (await engine.score(ScoreRequest(token_ids=(1, 2)))).logprobs
    finally:
        work.is_over = True
        engine._loop.remove_idle(work)


async def test_whoever_waits_too_long_for_an_idle_moment_is_sent_away(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "WAIT_S", 0.05)
    work = UntilWanted()
    engine._loop.add_idle(work)
    try:
        with pytest.raises(EngineBusyError, match="requests that come first"):
            await engine.score(ScoreRequest(token_ids=PROMPT))
    finally:
        work.is_over = True
        engine._loop.remove_idle(work)


def test_no_more_waits_than_there_is_room_for() -> None:
    queue = IdleQueue()
    for _ in range(MAX_WAITING):
        queue.add(UntilWanted())
    with pytest.raises(EngineBusyError):
        queue.add(UntilWanted())


def test_backward_looks_up_too() -> None:
    is_wanted = False
    attend = InterruptibleAttention([4], lambda: is_wanted)
    q, k, v = (torch.randn(4, 2, 8, requires_grad=True) for _ in range(3))
    out = attend(0, q, k, v)
    is_wanted = True
    with pytest.raises(Interrupted):
        out.sum().backward()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an empty prompt": ({"token_ids": ()}, InvalidRequestError, "empty"),
    "an id beyond the vocabulary": ({"token_ids": (999,)}, InvalidRequestError, "between 0 and"),
    "a prompt that fills the context": (
        {"token_ids": (1,) * 5000},
        PromptTooLongError,
        "5000 tokens",
    ),
    "no temperature": ({"temperature": 0.0}, InvalidRequestError, "temperature is 0.0"),
    "too many ids": ({"samples": 5000}, InvalidRequestError, "prompt_samples is 5000"),
    "an unknown adapter": ({"adapter": "x"}, UnknownAdapterError, "'x'"),
}


@pytest.mark.parametrize(("asked", "kind", "text"), BAD.values(), ids=BAD)
async def test_bad_requests_are_refused_with_what_is_wrong(
    engine: Engine, asked: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        await engine.score(ScoreRequest(**{"token_ids": PROMPT, **asked}))


async def test_what_waits_when_the_engine_stops_is_told(
    checkpoint: tuple[Path, PreTrainedModel],
) -> None:
    stopping = Engine.start(tiny_config(checkpoint[0]))
    work = UntilWanted()
    stopping._loop.add_idle(work)
    asked = asyncio.create_task(stopping.score(ScoreRequest(token_ids=PROMPT)))
    await asyncio.to_thread(work.began.wait)
    await stopping.stop()
    assert isinstance(work.error, EngineDeadError)
    with pytest.raises(EngineDeadError):
        await asked


# Over HTTP, with the engine in a process of its own.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> Any:
    async with running_tiny_model(tmp_path_factory.mktemp("served"), own_process=True) as server:
        yield server


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": [[5, 6, 7], [8, 9]], "max_tokens": 0, **fields}


@pytest.mark.asyncio(loop_scope="module")
async def test_completions_give_prompt_logprobs_as_vllm_does(running: Running) -> None:
    asked = body(prompt_logprobs=0, prompt_samples=4, seed=1)
    answer = (await running.http.post("/v1/completions", json=asked)).json()
    first, second = answer["choices"]
    assert first["prompt_logprobs"][0] is None
    assert [list(place) for place in first["prompt_logprobs"][1:]] == [["6"], ["7"]]
    assert first["prompt_logprobs"][1]["6"]["logprob"] < 0
    assert [len(ids) for ids in first["prompt_samples"][1:]] == [4, 4]
    assert len(second["prompt_logprobs"]) == 2
    assert answer["usage"]["total_tokens"] == 5
    assert len(answer["vocabulary"]) == 64


@pytest.mark.asyncio(loop_scope="module")
async def test_scores_are_nobodys_requests(running: Running) -> None:
    await running.http.post("/v1/completions", json=body(prompt_samples=1))
    text = (await running.admin.get("/metrics")).text
    counted = [line for line in text.splitlines() if line.startswith("vllm:prompt_tokens_total")]
    assert [float(line.split()[-1]) for line in counted] == [0.0]


REFUSED = {
    "text beside scores": (body(prompt_logprobs=0, max_tokens=1), "need max_tokens 0"),
    "a stream of scores": (body(prompt_logprobs=0, stream=True), "need max_tokens 0"),
    "no text and no scores": (body(), "max_tokens 0 needs prompt_logprobs"),
    "no temperature": (body(prompt_samples=1, temperature=0), "temperature is 0"),
}


@pytest.mark.parametrize(("asked", "text"), REFUSED.values(), ids=REFUSED)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_refused_score_says_what_to_change(
    running: Running, asked: dict[str, Any], text: str
) -> None:
    answer = await running.http.post("/v1/completions", json=asked)
    assert answer.status_code == 400
    assert text in answer.json()["error"]["message"]
