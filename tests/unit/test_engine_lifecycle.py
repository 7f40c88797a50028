"""Requests that end early, engines that are full, draining or dead."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from mizzen.runtime.engine.api import FinishedRequest, GenerationRequest, SamplingParams
from mizzen.runtime.engine.batch import StepInput
from mizzen.runtime.engine.engine import Engine
from mizzen.runtime.engine.errors import (
    DrainingError,
    EngineBusyError,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownAdapterError,
)
from mizzen.runtime.engine.kv_room import KvCacheTooSmallError
from mizzen.runtime.engine.startup import ContextTooLongError
from tests.fixtures.engine_models import collect, generate, save_served_llama, tiny_config

PROMPT = tuple(range(40))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_served_llama(path)
    return path


class Recorded:
    """Keeps what the engine reports."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.later: list[float] = []
        self.finished: list[FinishedRequest] = []
        self.step_tokens = 0

    def on_first_token(self, ttft_s: float) -> None:
        self.first.append(ttft_s)

    def on_token(self, itl_s: float) -> None:
        self.later.append(itl_s)

    def on_step(self, step_s: float, tokens: int) -> None:
        self.step_tokens += tokens

    def on_finish(self, finished: FinishedRequest) -> None:
        self.finished.append(finished)


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
async def engine(checkpoint: Path, recorded: Recorded) -> AsyncIterator[Engine]:
    config = tiny_config(
        checkpoint, max_num_seqs=2, max_num_batched_tokens=16, max_waiting=2, cpu_threads=1
    )
    started = Engine.start(config, recorded)
    yield started
    await started.stop()


class Gate:
    """Holds the engine within a step for as long as a test needs it there."""

    def __init__(self, engine: Engine) -> None:
        self._run = engine._ranks.run
        self._open = threading.Event()
        engine._ranks.run = self

    def __call__(self, step: StepInput, before_N: Tensor | None) -> Tensor | None:
        self._open.wait()
        return self._run(step, before_N)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(engine: Engine) -> Iterator[Gate]:
    gate = Gate(engine)
    yield gate
    gate.open()  # whatever the test did, the engine can stop


async def start_clients(engine: Engine, count: int) -> list[asyncio.Task]:
    """Have one request held within its first step, and the others wait behind it."""
    clients = [asyncio.create_task(collect(engine, endless("0")))]
    await until(lambda: engine.stats().running == 1)
    clients += [asyncio.create_task(collect(engine, endless(str(i)))) for i in range(1, count)]
    await until(lambda: engine.in_flight() == count)
    return clients


def endless(request_id: str = "r", **fields: object) -> GenerationRequest:
    sampling = SamplingParams(temperature=0, ignore_eos=True)
    values = {"request_id": request_id, "prompt_token_ids": PROMPT, "sampling": sampling}
    return GenerationRequest(**{**values, **fields})


def out_of_luck(step: StepInput, before_N: Tensor | None) -> None:
    raise RuntimeError("out of luck")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 - the condition is another thread's
            await asyncio.sleep(0.001)


def assert_empty(engine: Engine) -> None:
    engine._loop.scheduler.check()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_usage_ratio) == (0, 0, 0.0)
    assert engine.in_flight() == 0


async def test_a_closed_iterator_frees_its_blocks(engine: Engine, recorded: Recorded) -> None:
    outputs = engine.generate(endless())
    await anext(outputs)
    assert engine.in_flight() == 1 and engine.stats().kv_usage_ratio > 0
    await outputs.aclose()
    await until(lambda: recorded.finished and engine.in_flight() == 0)
    assert_empty(engine)
    assert [finished.finish_reason for finished in recorded.finished] == ["abort"]


async def test_a_cancelled_client_frees_its_blocks_wherever_it_stood(
    engine: Engine, gate: Gate
) -> None:
    clients = await start_clients(engine, 3)
    assert (engine.stats().running, engine.stats().waiting) == (1, 2)
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    assert engine.stats().kv_usage_ratio > 0  # the step that runs may still write to them
    gate.open()
    await until(lambda: engine.in_flight() == 0)
    assert_empty(engine)
    assert engine.stats().steps == 1


async def test_abort_ends_a_stream_with_its_reason(engine: Engine, gate: Gate) -> None:
    (client,) = await start_clients(engine, 1)
    await engine.abort("nobody")
    await engine.abort("0")
    gate.open()
    (output,) = await client
    assert (output.finish_reason, output.token_ids, output.output_tokens) == ("abort", (), 0)
    assert_empty(engine)


async def test_more_requests_than_may_wait_are_sent_away_with_a_time(
    engine: Engine, gate: Gate
) -> None:
    clients = await start_clients(engine, 3)
    with pytest.raises(EngineBusyError, match="2 requests wait") as raised:
        await collect(engine, endless("late"))
    assert raised.value.retry_after_s >= 1
    gate.open()
    assert [len(outputs) for outputs in await asyncio.gather(*clients)] == [216] * 3


REFUSED = {
    "a prompt as long as the context": (
        endless(prompt_token_ids=(1,) * 256),
        PromptTooLongError,
        "256 tokens and the context holds 256",
    ),
    "an empty prompt": (endless(prompt_token_ids=()), InvalidRequestError, "prompt is empty"),
    "a token the model does not have": (
        endless(prompt_token_ids=(1, 258)),
        InvalidRequestError,
        "not between 0 and 257",
    ),
    "an adapter nobody loaded": (
        endless(adapter="support"),
        UnknownAdapterError,
        "No adapter is called 'support'. Loaded adapters: none",
    ),
    "a temperature below zero": (
        endless(sampling=SamplingParams(temperature=-1)),
        InvalidRequestError,
        "temperature is -1; it must be between 0 and 100",
    ),
    "a top_p that is no number": (
        endless(sampling=SamplingParams(top_p=float("nan"))),
        InvalidRequestError,
        "top_p is nan",
    ),
    "no tokens at all": (
        endless(sampling=SamplingParams(max_tokens=0)),
        InvalidRequestError,
        "max_tokens is 0; it must be between 1 and 2147483647",
    ),
    "a bias on a token the model does not have": (
        endless(sampling=SamplingParams(logit_bias={999: 1.0})),
        InvalidRequestError,
        "token id is 999",
    ),
}


@pytest.mark.parametrize(("request_", "error", "text"), REFUSED.values(), ids=REFUSED)
async def test_the_engine_refuses(
    engine: Engine, request_: GenerationRequest, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        await collect(engine, request_)
    assert_empty(engine)
    assert engine.is_ready()


async def test_a_request_id_serves_one_request_at_a_time(engine: Engine, gate: Gate) -> None:
    (client,) = await start_clients(engine, 1)
    with pytest.raises(InvalidRequestError, match="'0' is in use"):
        await collect(engine, endless("0"))
    client.cancel()


async def test_draining_finishes_what_runs_and_takes_nothing_new(
    engine: Engine, gate: Gate
) -> None:
    clients = await start_clients(engine, 2)
    drain = asyncio.create_task(engine.drain(timeout_s=1000))
    await until(lambda: engine.draining)
    assert not engine.is_ready() and engine.is_alive()
    with pytest.raises(DrainingError, match="draining"):
        await collect(engine, endless("new"))
    gate.open()
    await drain
    for client in clients:
        assert (await client)[-1].finish_reason == "length"
    assert_empty(engine)


async def test_a_drain_out_of_time_aborts_the_rest(engine: Engine, gate: Gate) -> None:
    clients = await start_clients(engine, 2)
    drain = asyncio.create_task(engine.drain(timeout_s=0))
    await until(lambda: all(live.seq.abort_wanted for live in engine._loop.live.values()))
    gate.open()
    await drain
    for client in clients:
        assert (await client)[-1].finish_reason == "abort"
    assert_empty(engine)


async def test_a_failing_step_ends_every_request_and_liveness(engine: Engine, gate: Gate) -> None:
    clients = await start_clients(engine, 3)
    gate._run = out_of_luck
    gate.open()
    for result in await asyncio.gather(*clients, return_exceptions=True):
        assert isinstance(result, EngineDeadError) and "out of luck" in str(result)
    assert not engine.is_alive() and not engine.is_ready()
    with pytest.raises(EngineDeadError):
        await collect(engine, endless("late"))
    with pytest.raises(EngineDeadError):
        await asyncio.wrap_future(engine._loop.call_between_steps(lambda: None))
    await engine.drain(timeout_s=1000)


async def test_a_call_whose_asker_has_left_keeps_no_end_from_the_others(
    engine: Engine, gate: Gate
) -> None:
    (client,) = await start_clients(engine, 1)
    left, waits = (engine._loop.call_between_steps(lambda: None) for _ in range(2))
    left.cancel()
    gate._run = out_of_luck
    gate.open()
    async with asyncio.timeout(60):
        for result in await asyncio.gather(
            client, asyncio.wrap_future(waits), return_exceptions=True
        ):
            assert isinstance(result, EngineDeadError) and "out of luck" in str(result)


async def test_a_stopped_engine_leaves_nobody_waiting(engine: Engine, gate: Gate) -> None:
    (client,) = await start_clients(engine, 1)
    stopping = asyncio.create_task(engine.stop())
    await until(lambda: engine._loop._stopping)
    gate.open()
    await stopping
    with pytest.raises(EngineDeadError, match="stopped"):
        await client
    assert not engine.is_alive()
    await engine.stop()


async def test_an_old_heartbeat_is_not_alive(engine: Engine, gate: Gate) -> None:
    assert engine.is_alive()
    (client,) = await start_clients(engine, 1)
    engine._loop.heartbeat_at -= 1000.0
    assert not engine.is_alive()
    gate.open()
    await client
    assert engine.is_alive()


async def test_the_recorder_hears_of_every_token_and_the_whole_life(
    engine: Engine, recorded: Recorded
) -> None:
    await generate(engine, list(PROMPT), max_tokens=5)
    await generate(engine, list(PROMPT), max_tokens=1)
    assert (len(recorded.first), len(recorded.later)) == (2, 4)
    first, second = recorded.finished
    assert (first.prompt_tokens, first.cached_tokens, first.output_tokens) == (40, 0, 5)
    assert (second.cached_tokens, second.output_tokens) == (32, 1)
    assert first.e2e_s >= first.queue_s + first.prefill_s + first.decode_s > 0
    assert recorded.step_tokens == 40 + 4 + 8
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (80, 6)
    assert (stats.prefix_queries, stats.prefix_hits) == (80, 32)


def test_a_cache_that_cannot_hold_one_context_is_refused_with_both_ways_out(
    checkpoint: Path,
) -> None:
    with pytest.raises(KvCacheTooSmallError, match=r"holds 208 tokens and the context 256.*0.00 G"):
        Engine.start(tiny_config(checkpoint, kv_cache_gib=0.0001))


def test_a_context_the_model_was_not_made_for_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ContextTooLongError, match="256 tokens and 512 were asked"):
        Engine.start(tiny_config(checkpoint, max_model_len=512))
