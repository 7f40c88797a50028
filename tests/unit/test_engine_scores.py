"""What the model thinks of given tokens, computed while no request wants it."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mizzen.runtime.engine import engine as engine_module
from mizzen.runtime.engine import scoring as scoring_module
from mizzen.runtime.engine.api import ScoreRequest
from mizzen.runtime.engine.engine import Engine
from mizzen.runtime.engine.errors import (
    AsleepError,
    EngineBusyError,
    EngineDeadError,
    GenerationFailedError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownAdapterError,
)
from mizzen.runtime.engine.idle import MAX_WAITING, IdleQueue, Interrupted
from mizzen.runtime.engine.messages import FromEngine, Report, Started, Timings, ToEngine, open_link
from mizzen.runtime.engine.process import Host, TimingLog
from mizzen.runtime.engine.remote import RemoteEngine
from mizzen.runtime.engine.scoring import IsWanted, Scoring, rows_of_ranks, rows_of_whole
from mizzen.runtime.engine.startup import NullRecorder
from tests.fixtures.engine_models import (
    assert_scores_of,
    generate,
    greedy_reference,
    save_random_adapter,
    save_served_llama,
    tiny_config,
)
from tests.fixtures.runtime_server import Running, eventually, running_tiny_model

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
    """Work that would never end, were nobody to ask."""

    def __init__(self) -> None:
        self.began, self.given_up = threading.Event(), 0
        self.is_over = False

    def do(self, is_wanted: Callable[[], bool]) -> None:
        self.began.set()
        while not is_wanted():
            if self.is_over:
                return
            time.sleep(0.001)
        self.given_up += 1
        raise Interrupted

    def fail(self, error: Exception) -> None:
        self.error = error


@contextmanager
def idle_work(engine: Engine) -> Iterator[UntilWanted]:
    """Hold the loop with work that ends with the block."""
    work = UntilWanted()
    engine._loop.add_idle(work)
    try:
        yield work
    finally:
        work.is_over = True
        engine._loop.remove_idle(work)


async def test_scores_are_those_of_transformers(
    engine: Engine, checkpoint: tuple[Path, PreTrainedModel]
) -> None:
    scores = await engine.score(ScoreRequest(token_ids=PROMPT, alternatives=3))
    assert_scores_of(scores, checkpoint[1], PROMPT)
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


async def test_a_request_is_answered_though_idle_work_would_never_end(engine: Engine) -> None:
    with idle_work(engine) as work:
        await asyncio.to_thread(work.began.wait)
        assert len(await generate(engine, [1, 2, 3], max_tokens=4)) == 4
        assert work.given_up >= 1
    # The queue turns again: what was given up does not hold up what comes after it.
    assert len((await engine.score(ScoreRequest(token_ids=PROMPT))).logprobs) == len(PROMPT) - 1


async def test_whoever_waits_too_long_for_an_idle_moment_is_sent_away(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "WAIT_S", 0.05)
    busy = r"requests that come first: 0\.05 seconds .* to wait .* and to compute"
    with idle_work(engine), pytest.raises(EngineBusyError, match=busy):
        await engine.score(ScoreRequest(token_ids=PROMPT))


def test_no_more_waits_than_there_is_room_for() -> None:
    queue = IdleQueue(threading.Lock())
    for _ in range(MAX_WAITING):
        queue.add(UntilWanted())
    with pytest.raises(EngineBusyError, match="256 others wait already"):
        queue.add(UntilWanted())


def test_work_that_leaves_before_its_moment_leaves_the_loop_nothing_to_do() -> None:
    lock = threading.Lock()
    queue, work = IdleQueue(lock), UntilWanted()
    queue.add(work)
    queue.remove(work)
    queue.do_first(lambda: False)
    assert not work.began.is_set()


async def test_a_fault_of_ours_is_logged_where_it_happens_and_the_loop_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(engine._ranks, "adapter_of", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            await engine.score(ScoreRequest(token_ids=PROMPT))
    logged = [record for record in caplog.records if record.exc_info]
    assert [record.exc_info[0] for record in logged] == [ZeroDivisionError]
    assert (await engine.score(ScoreRequest(token_ids=PROMPT))).logprobs


async def test_the_loop_is_alive_while_it_computes_in_an_idle_moment(engine: Engine) -> None:
    with idle_work(engine) as work:
        await asyncio.to_thread(work.began.wait)
        stamped_at = engine._loop.heartbeat_at
        await eventually(lambda: engine._loop.heartbeat_at > stamped_at)


def test_a_score_is_given_up_when_its_asker_leaves(engine: Engine) -> None:
    asked = ScoreRequest(token_ids=PROMPT)

    def leave(is_wanted: IsWanted) -> Iterator[Tensor]:
        scoring.done.cancel()
        return rows_of_whole(engine._ranks.resident(), asked, None, is_wanted)

    scoring = Scoring(asked, leave)
    with pytest.raises(Interrupted):
        scoring.do(lambda: False)
    scoring.do(lambda: True)  # nobody waits: it is over before it looks up


def test_an_asker_that_leaves_at_the_last_moment_is_told_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scoring = Scoring(ScoreRequest(token_ids=PROMPT), lambda _: iter(()))
    monkeypatch.setattr(scoring_module, "score", lambda *_: scoring.done.cancel())
    scoring.do(lambda: False)
    scoring.fail(ZeroDivisionError())
    assert scoring.done.cancelled()


async def test_a_score_that_waits_when_the_engine_falls_asleep_is_told_so(
    checkpoint: tuple[Path, PreTrainedModel],
) -> None:
    engine = Engine.start(tiny_config(checkpoint[0]))
    with idle_work(engine) as work:
        await asyncio.to_thread(work.began.wait)
        asked = asyncio.create_task(engine.score(ScoreRequest(token_ids=PROMPT)))
        await eventually(lambda: len(engine._loop._idle._works) == 2)
        await engine.sleep(timeout_s=1)
    with pytest.raises(AsleepError):
        await asked
    await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two_ranks(checkpoint: tuple[Path, PreTrainedModel]) -> AsyncIterator[Engine]:
    started = Engine.start(
        tiny_config(checkpoint[0], tensor_parallel_size=2, max_num_batched_tokens=24)
    )
    yield started
    await started.stop()


LONG = tuple(range(10, 90))  # takes several steps


@pytest.mark.asyncio(loop_scope="module")
async def test_scores_of_two_ranks_are_those_of_transformers(
    two_ranks: Engine, checkpoint: tuple[Path, PreTrainedModel]
) -> None:
    scores = await two_ranks.score(ScoreRequest(token_ids=LONG, alternatives=3, samples=4))
    assert_scores_of(scores, checkpoint[1], LONG)
    assert [len(ids) for ids in scores.drawn] == [4] * (len(LONG) - 1)
    alone = await two_ranks.score(ScoreRequest(token_ids=LONG[:1]))
    assert alone.logprobs == ()


@pytest.mark.asyncio(loop_scope="module")
async def test_two_ranks_score_with_an_adapter_what_one_rank_does(
    two_ranks: Engine, engine: Engine, checkpoint: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    save_random_adapter(checkpoint[0], tmp_path / "a", seed=1)
    asked = ScoreRequest(token_ids=LONG, adapter="a")
    found = []
    for spread in (two_ranks, engine):
        await spread.load_adapter("a", tmp_path / "a")
        found.append([entry.logprob for entry in (await spread.score(asked)).logprobs])
        await spread.unload_adapter("a")
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    base = await engine.score(ScoreRequest(token_ids=LONG))
    assert found[1] != pytest.approx([entry.logprob for entry in base.logprobs], abs=0.01)


@pytest.mark.asyncio(loop_scope="module")
async def test_scores_of_two_ranks_leave_no_block_behind_and_no_answer_changed(
    two_ranks: Engine, checkpoint: tuple[Path, PreTrainedModel]
) -> None:
    pool = two_ranks._loop.scheduler.pool
    prompt = list(PROMPT)
    expected = greedy_reference(checkpoint[1], prompt, 8)
    assert await generate(two_ranks, prompt, max_tokens=8) == expected  # is cached from now on
    for _ in range(pool.total // pool.blocks_for(len(LONG)) + 1):
        await two_ranks.score(ScoreRequest(token_ids=LONG))
    pool.check()
    assert pool.used == 0
    assert await generate(two_ranks, prompt, max_tokens=8) == expected


@pytest.mark.asyncio(loop_scope="module")
async def test_two_ranks_give_up_a_score_between_two_steps(two_ranks: Engine) -> None:
    """A request that came would wait for one step, not for the whole prompt."""
    steps = []
    asked = ScoreRequest(token_ids=LONG)

    def is_wanted() -> bool:
        steps.append(1)
        return len(steps) == 3

    def score() -> None:
        rows = rows_of_ranks(two_ranks._ranks, two_ranks._loop.scheduler, asked, 0, is_wanted)
        with pytest.raises(Interrupted), torch.inference_mode():
            list(rows)

    await asyncio.wrap_future(two_ranks._loop.call_between_steps(score))
    assert len(steps) == 3
    assert (await two_ranks.score(asked)).logprobs


@pytest.mark.asyncio(loop_scope="module")
async def test_numbers_of_two_ranks_that_overflow_leave_no_trace(
    two_ranks: Engine, checkpoint: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    save_random_adapter(checkpoint[0], tmp_path / "broken", seed=1)
    file = tmp_path / "broken" / "adapter_model.safetensors"
    save_file({name: tensor * 1e38 for name, tensor in load_file(file).items()}, file)
    await two_ranks.load_adapter("broken", tmp_path / "broken")
    with pytest.raises(GenerationFailedError, match="Change the prompt"):
        await two_ranks.score(ScoreRequest(token_ids=LONG, adapter="broken"))
    await two_ranks.unload_adapter("broken")
    scores = await two_ranks.score(ScoreRequest(token_ids=LONG, alternatives=3))
    assert_scores_of(scores, checkpoint[1], LONG)


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


class EndedProcess:
    def wait(self, timeout_s: float) -> int:
        return 0


async def remote_of(engine: Engine, end: socket.socket) -> RemoteEngine:
    first = Report(engine.stats(), True, True, Timings(), [], [])
    started = Started(engine.model_len, engine.sizes)
    link = await open_link(end, FromEngine)
    return RemoteEngine(
        EndedProcess(), link, engine.tokenizer, NullRecorder(), started=started, first=first
    )


async def test_a_score_whose_asker_leaves_is_forgotten_in_the_engines_process(
    engine: Engine,
) -> None:
    left, right = socket.socketpair()
    host = Host(engine, TimingLog(), await open_link(left, ToEngine))
    serving = asyncio.create_task(host._listen())
    remote = await remote_of(engine, right)
    with idle_work(engine) as work:
        asked = asyncio.create_task(remote.score(ScoreRequest(token_ids=PROMPT)))
        await eventually(lambda: len(engine._loop._idle._works) == 2)
        asked.cancel()
        await eventually(lambda: list(engine._loop._idle._works) == [work])
    assert (await remote.score(ScoreRequest(token_ids=PROMPT))).logprobs
    assert not host._open
    await remote.stop()
    await serving


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
