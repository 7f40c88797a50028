"""From the first port to the last answer: loading, adapters at start, drain, stop, bad starts."""

import asyncio
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from mizzen.runtime.config import ServeConfig
from mizzen.runtime.engine.errors import EngineDeadError
from mizzen.runtime.engine.spawn import EngineProcess
from mizzen.runtime.server.listen import PortTakenError, bind_port
from mizzen.runtime.server.main import Server, serve
from mizzen.runtime.server.service import Phase
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.runtime_server import Running, eventually, running_server

CHAT = "/v1/chat/completions"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


class SlowStart:
    """An engine that is ready when told."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.loaded = asyncio.Event()

    async def __call__(self, *_: Any) -> FakeEngine:
        await self.loaded.wait()
        return self.engine


async def health(running: Running) -> dict[str, Any]:
    answers = {path: await running.admin.get(f"/{path}") for path in ("healthz", "readyz")}
    return {path: answer.status_code for path, answer in answers.items()} | {
        "phase": answers["readyz"].json()["phase"]
    }


async def test_probes_tell_the_truth_while_the_model_loads() -> None:
    start = SlowStart()
    async with running_server(start, wait=False) as running:
        await eventually(lambda: running.service.phase is Phase.LOADING_MODEL)
        assert await health(running) == {
            "healthz": 200,
            "readyz": 503,
            "phase": "loading-model",
        }
        metrics = (await running.admin.get("/metrics")).text
        assert 'phase="loading-model"' in metrics
        assert "vllm:num_requests_running{" in metrics
        start.loaded.set()
        await running.server.started.wait()
        assert await health(running) == {"healthz": 200, "readyz": 200, "phase": "serving"}


async def test_a_stop_while_the_model_loads_does_not_wait_for_it() -> None:
    async with running_server(SlowStart(), wait=False) as running:
        running.server.ask_to_stop()
        await running.task
        assert running.service.engine_or_none is None


async def test_an_engine_that_stalls_is_not_alive_although_its_ports_answer() -> None:
    engine = FakeEngine()
    async with running_server(engine) as running:
        engine.alive = False
        assert await health(running) == {"healthz": 503, "readyz": 503, "phase": "serving"}
        assert (await running.http.get("/health")).status_code == 503


async def start_server(
    engine: FakeEngine, *, dead_for_s: float
) -> tuple[Server, asyncio.Task[None]]:
    async def start(*_: Any) -> FakeEngine:
        return engine

    config = ServeConfig(model="/m", host="127.0.0.1", port=0, grpc_port=0, admin_port=0)
    server = Server(config, start, dead_for_s=dead_for_s)
    task = asyncio.create_task(server.run())
    await server.started.wait()
    return server, task


async def test_a_dead_engine_ends_the_process_where_nobody_probes() -> None:
    engine = FakeEngine()
    _, task = await start_server(engine, dead_for_s=0.2)
    engine.alive = False
    with pytest.raises(EngineDeadError, match="only a new process helps"):
        await task
    assert engine.stopped


async def test_a_process_that_stood_still_as_a_whole_does_not_end_for_it() -> None:
    class StoodStill(FakeEngine):
        """Shows itself at the third look after its process has stood still."""

        looks = 3

        def is_alive(self) -> bool:
            self.looks += 1
            return self.looks >= 3

    engine = StoodStill()
    server, task = await start_server(engine, dead_for_s=0.2)
    await eventually(lambda: engine.looks > 4)  # it is watched
    engine.looks = 0
    time.sleep(0.5)  # noqa: ASYNC251 - the event loop is what stands still
    await eventually(lambda: engine.looks >= 3)
    server.ask_to_stop()
    await task


async def test_a_cold_engine_is_alive_and_not_ready() -> None:
    async with running_server(FakeEngine(warm=False)) as running:
        assert await health(running) == {"healthz": 200, "readyz": 503, "phase": "serving"}


async def test_listed_adapters_are_loaded_before_the_first_request(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "good" / "adapter_config.json").write_text("{}")
    digest = "sha256:5246455da71252273e68731cba012ede6bf219c7975cd3c5d04f9de2f3a882b3"
    listed = tmp_path / "adapters.json"
    listed.write_text(
        json.dumps(
            {
                "adapters": [
                    {"name": "bad", "path": str(tmp_path / "bad")},
                    {"name": "outside", "path": "/etc"},
                    {"name": "good", "path": str(tmp_path / "good"), "digest": digest},
                ]
            }
        )
    )
    engine = FakeEngine()
    async with running_server(engine, adapters_file=listed, adapter_root=[tmp_path]) as running:
        assert (await health(running))["readyz"] == 200
        state = (await running.admin.get("/adapters")).json()
        assert [adapter["name"] for adapter in state["adapters"]] == ["good"]
        assert state["adapters"][0]["digest"] == digest
        errors = {error["name"]: error["message"] for error in state["errors"]}
        assert "adapter_config.json" in errors["bad"]
        assert "--adapter-root" in errors["outside"]


async def test_an_adapter_that_the_engine_fails_on_does_not_keep_the_base_model_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad").mkdir()
    listed = tmp_path / "adapters.json"
    listed.write_text(json.dumps({"adapters": [{"name": "bad", "path": str(tmp_path / "bad")}]}))
    engine = FakeEngine()

    async def fail(name: str, path: Path, digest: str | None = None) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "load_adapter", fail)
    async with running_server(engine, adapters_file=listed, adapter_root=[tmp_path]) as running:
        assert (await health(running))["readyz"] == 200
        errors = (await running.admin.get("/adapters")).json()["errors"]
        assert errors == [
            {"name": "bad", "message": "The server failed on this adapter; its log says why."}
        ]


@pytest.mark.parametrize("content", [None, "{", '{"adapters": [{"name": "x"}]}', "[]"])
async def test_a_missing_or_broken_list_does_not_keep_the_base_model_down(
    tmp_path: Path, content: str | None
) -> None:
    listed = tmp_path / "adapters.json"
    if content is not None:
        listed.write_text(content)
    async with running_server(FakeEngine(), adapters_file=listed) as running:
        assert (await health(running))["readyz"] == 200
        errors = (await running.admin.get("/adapters")).json()["errors"]
        assert len(errors) == (0 if content is None else 1)


async def drain_state(running: Running) -> dict[str, Any]:
    return (await running.admin.get("/drain")).json()


async def test_drain_serves_late_arrivals_then_refuses_and_cuts_no_stream() -> None:
    engine = FakeEngine(stall_after=3)
    async with running_server(engine, lame_duck_seconds=0.5) as running:
        stream = asyncio.create_task(running.http.post(CHAT, json=ASKED | {"stream": True}))
        await eventually(lambda: engine.in_flight() == 1)
        answer = await running.admin.post("/drain", json={"timeoutSeconds": 30})
        assert answer.status_code == 202
        assert await health(running) == {"healthz": 200, "readyz": 503, "phase": "lame-duck"}
        late = asyncio.create_task(running.http.post(CHAT, json=ASKED))
        await eventually(lambda: engine.in_flight() == 2)
        await eventually(lambda: running.service.phase is Phase.DRAINING)
        refused = await running.http.post(CHAT, json=ASKED)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "draining"
        assert await drain_state(running) == {"draining": True, "inFlight": 2}
        engine.release.set()
        assert (await late).json()["choices"][0]["message"]["content"] == "Hello world"
        assert (await stream).text.endswith("data: [DONE]\n\n")
        await running.server.drain.wait()
        assert await drain_state(running) == {"draining": True, "inFlight": 0}


async def test_what_outlasts_the_drain_is_ended_with_an_error_event() -> None:
    engine = FakeEngine(stall_after=3)
    async with running_server(engine) as running:
        stream = asyncio.create_task(running.http.post(CHAT, json=ASKED | {"stream": True}))
        await eventually(lambda: engine.in_flight() == 1)
        await running.admin.post("/drain", json={"timeoutSeconds": 0.05})
        text = (await stream).text
        last = json.loads(text.strip().rpartition("data: ")[2])
        assert last["error"]["code"] == "aborted"
        assert "[DONE]" not in text


async def test_drain_may_be_asked_for_again(tmp_path: Path) -> None:
    async with running_server(FakeEngine()) as running:
        assert await drain_state(running) == {"draining": False, "inFlight": 0}
        for body in (b"", b"{}", b'{"timeoutSeconds": 3}'):
            answer = await running.admin.post("/drain", content=body)
            assert answer.status_code == 202
            assert answer.json()["draining"] is True
        for body in (b"{", b'{"timeoutSeconds": -1}', b'{"seconds": 1}'):
            assert (await running.admin.post("/drain", content=body)).status_code == 400


async def test_sigterm_finishes_what_runs_and_exits() -> None:
    engine = FakeEngine(stall_after=3)
    async with running_server(engine) as running:
        stream = asyncio.create_task(running.http.post(CHAT, json=ASKED | {"stream": True}))
        await eventually(lambda: engine.in_flight() == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: running.service.phase is Phase.DRAINING)
        assert not running.task.done()
        engine.release.set()
        assert (await stream).text.endswith("data: [DONE]\n\n")
        await running.task
        assert engine.stopped


async def test_a_second_signal_does_not_wait() -> None:
    engine = FakeEngine(stall_after=3)
    async with running_server(engine, drain_seconds=3600) as running:
        stream = asyncio.create_task(running.http.post(CHAT, json=ASKED | {"stream": True}))
        await eventually(lambda: engine.in_flight() == 1)
        running.server.ask_to_stop()
        await eventually(lambda: running.service.phase is Phase.DRAINING)
        running.server.ask_to_stop()
        await running.task
        await asyncio.wait((stream,))
        assert stream.exception() is not None


async def test_a_crash_at_start_is_not_taken_for_a_bad_configuration() -> None:
    async def crash(*_: Any) -> Any:
        raise EngineDeadError("A rank was lost while the model was loaded.")

    with pytest.raises(EngineDeadError):
        async with running_server(crash):
            pass


async def test_a_taken_port_is_told_with_the_flag_to_change() -> None:
    async with running_server(FakeEngine()) as running:
        ports = running.server.ports
        for taken in ("port", "grpc_port", "admin_port"):
            number = {"port": ports.http, "grpc_port": ports.grpc, "admin_port": ports.admin}
            settings = {"port": 0, "grpc_port": 0, "admin_port": 0, taken: number[taken]}
            config = ServeConfig(model="/models/tiny", host="127.0.0.1", **settings)
            with pytest.raises(PortTakenError, match="--admin-port"):
                await Server(config, SlowStart()).run()


def test_answers_are_not_held_back_by_nagle() -> None:
    with bind_port("127.0.0.1", 0) as bound:
        # Event loops set TCP_NODELAY only where the socket says that it is TCP.
        assert bound.proto == socket.IPPROTO_TCP


BAD_MODELS = {
    "missing": ("ModelNotFound", None),
    "unknown architecture": (
        "UnknownArchitecture",
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
    ),
    "wants remote code": (
        "RemoteCodeRefused",
        {"architectures": ["X"], "model_type": "llama", "auto_map": {"AutoModel": "x.X"}},
    ),
}


@pytest.mark.parametrize(("reason", "config"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_model_that_cannot_be_served_exits_42_and_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reason: str,
    config: dict[str, Any] | None,
) -> None:
    model, note = tmp_path / "model", tmp_path / "termination"
    if config is not None:
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("MIZZEN_TERMINATION_LOG", str(note))
    ports = {"host": "127.0.0.1", "port": 0, "grpc_port": 0, "admin_port": 0}
    assert serve(ServeConfig(model=str(model), **ports), EngineProcess()) == 42
    told = json.loads(note.read_text())
    assert told["reason"] == reason
    assert told["message"] in capsys.readouterr().err
