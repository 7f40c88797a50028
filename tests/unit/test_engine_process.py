"""The engine in a process of its own, and what the server makes of its silence or its end."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from mizzen.runtime.engine import process as engine_process
from mizzen.runtime.engine import remote
from mizzen.runtime.engine.api import (
    EngineStats,
    GenerationRequest,
    Grammar,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.errors import (
    AdapterLoadError,
    AsleepError,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownAdapterError,
)
from mizzen.runtime.engine.messages import (
    Abort,
    Ended,
    FromEngine,
    Generate,
    Report,
    Start,
    Started,
    Timings,
    ToEngine,
    open_link,
    to_error,
    to_fault,
)
from mizzen.runtime.engine.process import TimingLog
from mizzen.runtime.engine.spawn import EngineProcess
from mizzen.runtime.engine.startup import NullRecorder
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.errors import EXIT_RANK_LOST, BadModelError, MizzenError, RankLostError
from mizzen.runtime.server.errors import to_api_error
from tests.fixtures.fake_engine import SIZES, FakeEngine
from tests.fixtures.runtime_server import Running, eventually, running_tiny_model

CHAT = "/v1/chat/completions"
ASKED = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "ignore_eos": True,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    with pytest.raises(EngineDeadError):  # the last test kills it
        async with running_tiny_model(tmp_path_factory.mktemp("model"), own_process=True) as it:
            yield it


async def ask(running: Running, max_tokens: int) -> httpx.Response:
    return await running.http.post(CHAT, json=ASKED | {"max_tokens": max_tokens})


@pytest.mark.asyncio(loop_scope="module")
async def test_a_stopped_engine_is_soon_not_ready_though_the_port_answers(
    running: Running,
) -> None:
    assert (await ask(running, 3)).status_code == 200
    os.kill(running.process.pid, signal.SIGSTOP)
    try:
        asked = asyncio.create_task(ask(running, 400))
        async with asyncio.timeout(300):
            while (await running.admin.get("/readyz")).status_code == 200:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert (await running.http.get("/health")).status_code == 503
        assert (await running.http.get("/v1/models")).status_code == 200
        refused = await ask(running, 3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        assert (await running.admin.get("/healthz")).status_code == 200  # it may still come back
        assert not asked.done()
    finally:
        os.kill(running.process.pid, signal.SIGCONT)
    # Heard again, it is ready again, and what it was asked meanwhile is answered.
    await eventually(running.service.is_ready)
    assert (await asked).json()["usage"]["completion_tokens"] == 400


@pytest.mark.asyncio(loop_scope="module")
async def test_a_killed_engine_is_not_ready_at_once_and_its_requests_get_503(
    running: Running,
) -> None:
    os.kill(running.process.pid, signal.SIGSTOP)  # it must not have answered by then
    asked = asyncio.create_task(ask(running, 400))
    await eventually(lambda: running.service.engine.in_flight() == 1)
    os.kill(running.process.pid, signal.SIGKILL)
    assert (await asked).json()["error"]["code"] == "engine_dead"
    assert (await running.admin.get("/readyz")).status_code == 503
    assert (await running.admin.get("/healthz")).status_code == 503
    refused = await ask(running, 3)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    assert (await running.admin.post("/wake", json={})).status_code == 503
    await asyncio.wait([running.task])


class MuteProcess:
    """Says that it has started, and then nothing."""

    def __init__(self) -> None:
        self.socket, self.other = socket.socketpair()
        self.is_killed = False

    async def start(self) -> None:
        link = await open_link(self.other, ToEngine)
        assert isinstance(await link.receive(), Start)
        link.send(Started(model_len=512, sizes=SIZES))
        link.send(MESSAGES[-1][1])
        await link.receive()  # a request that is never answered
        await asyncio.Event().wait()

    def clean_up(self) -> None:
        pass

    def wait(self, timeout_s: float) -> int | None:
        return -signal.SIGKILL if self.is_killed else None

    def kill(self) -> None:
        self.is_killed = True


@pytest.mark.parametrize(
    ("wrong", "refusal"),
    [
        ({"sampling": SamplingParams(seed=2**70)}, OverflowError),
        ({"priority": True}, msgspec.ValidationError),  # which would end the engine
    ],
)
async def test_a_request_that_the_engine_could_not_read_is_neither_sent_nor_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: dict[str, Any],
    refusal: type[Exception],
) -> None:
    monkeypatch.setattr(Tokenizer, "load", lambda path: None)
    process = MuteProcess()
    muted = asyncio.create_task(process.start())
    engine = await remote.RemoteEngine.start(process, EngineConfig(model=tmp_path), NullRecorder())
    with pytest.raises(refusal):
        await anext(engine.generate(replace(REQUEST, **wrong)))
    assert engine.in_flight() == 0
    process.is_killed = True
    await engine.stop()
    muted.cancel()


async def test_an_engine_that_stays_silent_is_dead_ends_its_requests_and_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TICK_S", 0.01)
    monkeypatch.setattr(Tokenizer, "load", lambda path: None)
    process = MuteProcess()
    muted = asyncio.create_task(process.start())
    config = EngineConfig(model=tmp_path)
    engine = await remote.RemoteEngine.start(process, config, NullRecorder())
    assert engine.is_alive()  # nothing is awaited in between, so that no tick has passed
    with pytest.raises(EngineDeadError, match="does not answer"):
        await anext(engine.generate(REQUEST))
    assert not engine.is_alive()
    assert not engine.is_ready()
    with pytest.raises(EngineDeadError, match="does not answer"):
        await engine.wake()
    await engine.stop()
    assert process.is_killed
    muted.cancel()


async def test_an_engine_that_rests_gives_freed_memory_back_until_it_works_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_back: list[int] = []
    engine = FakeEngine()
    monkeypatch.setattr(engine_process, "BEAT_S", 0.01)
    monkeypatch.setattr(engine_process, "give_back_freed", lambda: given_back.append(engine.steps))
    monkeypatch.setattr(engine_process, "_end_within", lambda seconds: None)
    ours, theirs = socket.socketpair()
    link = await open_link(ours, ToEngine)
    serving = asyncio.create_task(engine_process.Host(engine, TimingLog(), link).run())
    await eventually(lambda: given_back == [0])
    engine.steps = 7
    await eventually(lambda: given_back == [0, 7])
    theirs.close()
    assert await serving == 0
    await link.close()


async def test_a_request_that_is_called_off_before_it_began_leaves_nothing() -> None:
    ours, theirs = socket.socketpair()
    link, server = await open_link(ours, ToEngine), await open_link(theirs, FromEngine)
    host = engine_process.Host(FakeEngine(), TimingLog(), link)
    request = GenerationRequest(
        request_id="one", prompt_token_ids=(5, 6), sampling=SamplingParams(max_tokens=4)
    )
    server.send(Generate(request))
    server.send(Abort("one"))
    serving = asyncio.create_task(host._listen())
    server.send(Generate(replace(request, request_id="two")))
    await eventually(lambda: host._engine.in_flight() == 0 and not host._open)
    await server.close()
    await serving
    assert not host._open
    await link.close()


async def test_why_an_engine_has_ended_is_heard_though_requests_still_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = FakeEngine()
    engine.fate = RankLostError("Pod 1 closed its connection.")
    monkeypatch.setattr(engine_process, "GOODBYE_S", 300)
    monkeypatch.setattr(engine_process, "_end_within", lambda seconds: None)
    ours, theirs = socket.socketpair()
    link, server = await open_link(ours, ToEngine), await open_link(theirs, FromEngine)
    server._writer.transport.pause_reading()  # it is busy, and has not read them yet

    async def serve() -> int:
        code = await engine_process.Host(engine, TimingLog(), link).run()
        await link.close()
        return code

    serving = asyncio.create_task(serve())
    for number in range(100):
        server.send(Abort(str(number)))
        await asyncio.sleep(0)
    server._writer.transport.resume_reading()
    heard: object = None
    while not isinstance(heard, Ended):
        heard = await server.receive()
        assert heard is not None, "it is gone and has not said why"
    assert isinstance(to_error(heard.fault), RankLostError)
    await server.close()
    assert await serving == EXIT_RANK_LOST


async def test_the_engine_ends_when_the_server_does(tmp_path: Path) -> None:
    with EngineProcess() as process:
        process.socket.close()
        assert process.wait(60) == 0


def test_the_server_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, mizzen.runtime.server.main as _; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unwanted = {"torch", "numpy", "transformers", "pandas", "llguidance"}
    assert unwanted.isdisjoint(done.stdout.split())


def test_the_engine_imports_no_grammars_before_one_is_asked_for() -> None:
    code = "import sys, mizzen.runtime.engine.process as _; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"llguidance", "transformers", "pandas"}.isdisjoint(done.stdout.split())


def test_a_process_that_has_a_server_can_still_have_a_client() -> None:
    code = (
        "import mizzen.runtime.server.grpc_server, tritonclient.grpc.aio as client; "
        "from mizzen.runtime.server import oip_messages as ours; "
        "from tritonclient.grpc import service_pb2 as theirs; "
        "print(client.InferenceServerClient.__name__, ours.service_pb2 is theirs)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["InferenceServerClient", "True"]


ERRORS: list[tuple[Exception, int]] = [
    (PromptTooLongError(prompt_tokens=9, model_len=4), 400),
    (InvalidRequestError("top_p is 2; it must be between 0 and 1."), 400),
    (AsleepError("This replica sleeps.", retry_after_s=5.0), 503),
    (UnknownAdapterError("support", ["other"]), 404),
    (AdapterLoadError("Adapter support cannot be loaded."), 400),
    (BadModelError("model.safetensors ends early."), 400),
    (RankLostError("Rank 1 ended with exit code -9."), 500),
    (EngineDeadError("The engine has been stopped."), 503),
]


@pytest.mark.parametrize(("error", "status"), ERRORS, ids=lambda part: type(part).__name__)
def test_an_error_arrives_as_it_was_raised(error: MizzenError, status: int) -> None:
    received = to_error(to_fault(error))
    assert type(received) is type(error)
    assert str(received) == str(error)
    assert (received.reason, received.exit_code) == (error.reason, error.exit_code)
    assert vars(to_api_error(received)) == vars(to_api_error(error))
    assert to_api_error(received).status == status


def test_an_error_of_the_start_keeps_its_reason_without_its_class() -> None:
    class KvCacheTooSmallError(BadModelError):
        reason = "KvCacheTooSmall"

    received = to_error(to_fault(KvCacheTooSmallError("Give it at least 2 GiB.")))
    assert type(received) is BadModelError
    assert (received.reason, str(received)) == ("KvCacheTooSmall", "Give it at least 2 GiB.")


def test_a_fault_of_ours_arrives_as_a_500_that_says_nothing() -> None:
    received = to_error(to_fault(ZeroDivisionError("division by zero")))
    assert str(received) == "ZeroDivisionError: division by zero"
    assert to_api_error(received).status == 500
    assert "division" not in to_api_error(received).message


STATS = EngineStats(
    running=1,
    waiting=2,
    blocks_total=3,
    blocks_free=2,
    kv_usage_ratio=1 / 3,
    prompt_tokens=4,
    generation_tokens=5,
    preemptions=0,
    prefix_queries=0,
    prefix_hits=0,
    steps=6,
    heartbeat_age_s=0.5,
    running_adapters=("support",),
    start_seconds={"weights": 1.5},
)
OUTPUT = TokenOutput(
    token_ids=(7,),
    text="Ahoi",
    logprobs=(TokenLogprob(token_id=7, logprob=-0.5, top=((7, -0.5), (8, -1.0))),),
    finish_reason="stop",
    stop_reason=7,
    embedding=(0.25, -1.5),
)
REQUEST = GenerationRequest(
    request_id="a",
    prompt_token_ids=(1, 2),
    sampling=SamplingParams(logit_bias={5: -1.5}, stop=("END",), grammar=Grammar("regex", "a+")),
)
MESSAGES = [
    (ToEngine, Start(EngineConfig(model=Path("/models/tiny"), kv_cache_gib=0.5))),
    (ToEngine, Generate(REQUEST)),
    (ToEngine, Generate(replace(REQUEST, adapter="support", priority=-1))),
    (FromEngine, Report(STATS, True, False, Timings([0.5]), [("a", OUTPUT)], [])),
]


@pytest.mark.parametrize(("reads", "message"), MESSAGES, ids=lambda part: type(part).__name__)
async def test_a_message_arrives_as_it_was_sent(reads: object, message: ToEngine) -> None:
    left, right = socket.socketpair()
    sender, receiver = await open_link(left, reads), await open_link(right, reads)
    sender.send(message)
    await sender.close()
    assert await receiver.receive() == message
    assert await receiver.receive() is None
    await receiver.close()


async def test_an_unknown_message_is_refused() -> None:
    left, right = socket.socketpair()
    sender, receiver = await open_link(left, FromEngine), await open_link(right, ToEngine)
    sender.send(MESSAGES[-1][1])
    with pytest.raises(msgspec.ValidationError):
        await receiver.receive()
    await sender.close()
    await receiver.close()
