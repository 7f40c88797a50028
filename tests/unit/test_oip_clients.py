"""The Open Inference Protocol as the official tritonclient speaks it, all four clients."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from mizzen.runtime.engine.errors import EngineBusyError
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.runtime_server import Running, eventually, running_server
from tests.fixtures.triton_tensors import tensors

# One server for all tests here; each begins with the engine as new.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("fake")]
ENGINE = FakeEngine()
# Of a folder that holds only an adapter_config.json of "{}".
DIGEST = "sha256:5246455da71252273e68731cba012ede6bf219c7975cd3c5d04f9de2f3a882b3"


@pytest.fixture(scope="module")
def adapter_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    (root / "support").mkdir()
    (root / "support" / "adapter_config.json").write_text("{}")
    (root / "empty").mkdir()
    (root / "outside").symlink_to("/etc")
    return root


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(adapter_root: Path) -> AsyncIterator[Running]:
    async with running_server(ENGINE, adapter_root=[adapter_root]) as running:
        yield running


@pytest.fixture
def fake() -> FakeEngine:
    ENGINE.reset()
    return ENGINE


def text(result: Any, name: str = "text_output") -> str:
    return result.as_numpy(name)[0].decode()


CLIENTS = {
    "http": (tritonclient.http, "http_address"),
    "http.aio": (tritonclient.http.aio, "http_address"),
    "grpc": (tritonclient.grpc, "grpc_address"),
    "grpc.aio": (tritonclient.grpc.aio, "grpc_address"),
}


class AnyClient:
    """One of the four clients, called the same way."""

    def __init__(self, name: str, running: Running) -> None:
        self.kind, address = CLIENTS[name]
        self.is_grpc = name.startswith("grpc")
        self.is_async = name.endswith("aio")
        # The HTTP client stands on gevent, whose sockets belong to the thread that opened them.
        self.thread = ThreadPoolExecutor(1)
        self.client = self.kind.InferenceServerClient(getattr(running, address))

    async def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_async:
            return await function(*args, **kwargs)
        call = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self.thread, call)

    def __getattr__(self, method: str) -> Any:
        async def made(*args: Any, **kwargs: Any) -> Any:
            return await self.call(getattr(self.client, method), *args, **kwargs)

        return made

    async def as_dict(self, method: str, *args: Any) -> Any:
        kwargs = {"as_json": True} if self.is_grpc else {}
        return await self.call(getattr(self.client, method), *args, **kwargs)


@pytest_asyncio.fixture(loop_scope="module", params=CLIENTS)
async def client(request: pytest.FixtureRequest, running: Running) -> AsyncIterator[AnyClient]:
    made = AnyClient(request.param, running)
    yield made
    await made.close()
    made.thread.shutdown()


async def test_health_tells_the_engine_s_state(client: AnyClient, fake: FakeEngine) -> None:
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("tiny")
    assert await client.is_model_ready("tiny", "1")
    fake.alive = False
    assert not await client.is_server_live()
    assert not await client.is_server_ready()
    assert not await client.is_model_ready("tiny")


async def test_metadata_and_config_name_the_tensors(client: AnyClient) -> None:
    server = await client.as_dict("get_server_metadata")
    assert server["name"] == "mizzen"
    model = await client.as_dict("get_model_metadata", "tiny")
    assert [given["name"] for given in model["inputs"]][:2] == ["text_input", "stream"]
    assert {given["datatype"] for given in model["outputs"]} == {"BYTES", "UINT32"}
    config = await client.as_dict("get_model_config", "tiny")
    config = config.get("config", config)
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["input"][0]["data_type"] == "TYPE_STRING"


async def test_infer_answers_and_statistics_count_it(client: AnyClient, fake: FakeEngine) -> None:
    before = await client.as_dict("get_inference_statistics", "tiny")
    result = await client.infer(
        "tiny",
        tensors(
            client.kind,
            text_input=b"Say: ",
            sampling_parameters=b'{"max_tokens": 5, "temperature": "0.5", "seed": 1}',
            exclude_input_in_output=True,
        ),
        request_id="r1",
    )
    assert text(result) == "Hello"
    assert text(result, "finish_reason") == "length"
    assert result.as_numpy("num_input_tokens")[0] == 5
    assert result.as_numpy("num_output_tokens")[0] == 5
    assert fake.requests[0].sampling.temperature == 0.5
    after = await client.as_dict("get_inference_statistics", "tiny")
    counts = [int(stats["model_stats"][0].get("inference_count", 0)) for stats in (before, after)]
    assert counts[1] == counts[0] + 1


async def test_a_whole_answer_repeats_its_input_unless_told_otherwise(client: AnyClient) -> None:
    inputs = tensors(client.kind, text_input="Ahoi é ".encode())
    wanted = [client.kind.InferRequestedOutput("text_output")]
    result = await client.infer("tiny", inputs, outputs=wanted)
    assert text(result) == "Ahoi é Hello world"
    assert result.as_numpy("finish_reason") is None


async def test_errors_say_what_to_change(client: AnyClient, fake: FakeEngine) -> None:
    cases = {
        "does not exist here": ("other", {"text_input": b"x"}),
        "text_input is missing": ("tiny", {"stream": False}),
        "Unexpected input 'image'": ("tiny", {"text_input": b"x", "image": b"y"}),
        "expected datatype BOOL": ("tiny", {"text_input": b"x", "stream": b"y"}),
        "max_tokens: Input should be greater": (
            "tiny",
            {"text_input": b"x", "sampling_parameters": b'{"max_tokens": -1}'},
        ),
        "sampling_parameters: The body is not valid JSON": (
            "tiny",
            {"text_input": b"x", "sampling_parameters": b"{"},
        ),
        "not valid UTF-8": ("tiny", {"text_input": b"\xff"}),
        "context holds 128": ("tiny", {"text_input": b"x" * 200}),
        "cannot stream": ("tiny", {"text_input": b"x", "stream": True}),
    }
    for message, (model, values) in cases.items():
        with pytest.raises(InferenceServerException, match=message):
            await client.infer(model, tensors(client.kind, **values))
    classes = [client.kind.InferRequestedOutput("text_output", class_count=2)]
    with pytest.raises(InferenceServerException, match="classification is not supported here"):
        await client.infer("tiny", tensors(client.kind, text_input=b"x"), outputs=classes)
    fake.refuse = EngineBusyError("Too many wait.", retry_after_s=3)
    with pytest.raises(InferenceServerException, match="Too many wait"):
        await client.infer("tiny", tensors(client.kind, text_input=b"x"))


async def test_an_adapter_is_loaded_listed_used_and_unloaded(
    client: AnyClient, fake: FakeEngine, adapter_root: Path
) -> None:
    path = adapter_root / "support"
    config = {"parameters": {"path": str(path), "digest": DIGEST}}
    await client.load_model("support", config=json.dumps(config))
    assert fake.loads == [("support", path, DIGEST)]
    index = await client.as_dict("get_model_repository_index")
    models = index["models"] if client.is_grpc else index
    assert {model["name"]: model["state"] for model in models} == {
        "tiny": "READY",
        "support": "READY",
    }
    assert await client.is_model_ready("support")
    await client.infer("support", tensors(client.kind, text_input=b"x"))
    by_parameter = tensors(
        client.kind, text_input=b"x", sampling_parameters=b'{"lora_name": "support"}'
    )
    await client.infer("tiny", by_parameter)
    assert [request.adapter for request in fake.requests] == ["support", "support"]
    await client.unload_model("support")
    with pytest.raises(InferenceServerException, match="No adapter is called"):
        await client.unload_model("support")
    with pytest.raises(InferenceServerException, match="does not exist here"):
        await client.infer("support", tensors(client.kind, text_input=b"x"))


async def test_a_bad_adapter_is_refused_and_listed_with_its_reason(
    client: AnyClient, running: Running, adapter_root: Path
) -> None:
    root = adapter_root
    cases = [
        ("only from below", "/etc"),
        ("only from below", f"{root}/../../etc"),
        ("only from below", f"{root}/outside"),
        ("is not a directory", f"{root}/missing"),
        ("holds no adapter_config", f"{root}/empty"),
    ]
    other = {"path": f"{root}/support", "digest": "sha256:" + "ab" * 32}
    with pytest.raises(InferenceServerException, match="have the digest"):
        await client.load_model("broken", config=json.dumps({"parameters": other}))
    for message, path in cases:
        config = json.dumps({"parameters": {"path": path}})
        with pytest.raises(InferenceServerException, match=message):
            await client.load_model("broken", config=config)
    for config in ("{", "[]", "{}", '{"parameters": {"path": "/x", "digest": "md5:1"}}'):
        with pytest.raises(InferenceServerException):
            await client.load_model("broken", config=config)
    for name in ("tiny", "a:b"):
        config = json.dumps({"parameters": {"path": f"{root}/support"}})
        with pytest.raises(InferenceServerException, match="cannot be an adapter's name"):
            await client.load_model(name, config=config)
    listed = running.service.adapter_errors
    assert "holds no adapter_config" in listed["broken"]
    await running.http.post("/v2/repository/models/broken/unload")
    assert "broken" not in listed


@pytest.mark.parametrize("algorithm", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
async def test_http_takes_compressed_and_json_tensors(
    running: Running, algorithm: str | None, binary: bool
) -> None:
    given = tritonclient.http.InferInput("text_input", [1], "BYTES")
    given.set_data_from_numpy(np.array(["Hé"], dtype=np.object_), binary_data=binary)
    wanted = [tritonclient.http.InferRequestedOutput("text_output", binary_data=binary)]
    async with tritonclient.http.aio.InferenceServerClient(running.http_address) as client:
        result = await client.infer(
            "tiny", [given], outputs=wanted, request_compression_algorithm=algorithm
        )
    value = result.as_numpy("text_output")[0]
    assert (value.decode() if binary else value) == "HéHello world"


async def test_http_load_takes_plain_parameters(
    running: Running, fake: FakeEngine, adapter_root: Path
) -> None:
    body = {"parameters": {"path": str(adapter_root / "support"), "digest": DIGEST}}
    answer = await running.http.post("/v2/repository/models/support/load", json=body)
    assert answer.status_code == 200
    listed = (await running.admin.get("/adapters")).json()
    assert listed["adapters"][0]["digest"] == DIGEST


BROKEN_BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    "not JSON": (b"{", {}),
    "no object": (b"[]", {}),
    "inputs no list": (b'{"inputs": 5}', {}),
    "header length over the body": (b"{}", {"Inference-Header-Content-Length": "9"}),
    "header length no number": (b"{}", {"Inference-Header-Content-Length": "-1"}),
    "binary size over the body": (
        b'{"inputs":[{"name":"text_input","datatype":"BYTES","shape":[1],'
        b'"parameters":{"binary_data_size":99}}]}',
        {},
    ),
    "element longer than its tensor": (
        b'{"inputs":[{"name":"text_input","datatype":"BYTES","shape":[1],'
        b'"parameters":{"binary_data_size":5}}]}\xff\xff\xff\xffx',
        {"Inference-Header-Content-Length": "108"},
    ),
    "data of another type": (
        b'{"inputs":[{"name":"text_input","datatype":"BYTES","shape":[1],"data":[5]}]}',
        {},
    ),
    "a datatype not taken": (
        b'{"inputs":[{"name":"text_input","datatype":"FP32","shape":[1],"data":[5]}]}',
        {},
    ),
    "gzip that is none": (b"{}", {"Content-Encoding": "gzip"}),
    "gzip cut short": (gzip.compress(b'{"inputs": []}')[:-4], {"Content-Encoding": "gzip"}),
    "nested for ever": (b"[" * 100_000, {}),
}


@pytest.mark.parametrize(("body", "headers"), BROKEN_BODIES.values(), ids=BROKEN_BODIES)
async def test_a_broken_http_body_is_a_400(
    running: Running, body: bytes, headers: dict[str, str]
) -> None:
    answer = await running.http.post("/v2/models/tiny/infer", content=body, headers=headers)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]


async def test_a_small_body_that_grows_on_inflation_is_a_413(running: Running) -> None:
    bomb = gzip.compress(b" " * (16 << 20))
    answer = await running.http.post(
        "/v2/models/tiny/infer", content=bomb, headers={"Content-Encoding": "gzip"}
    )
    assert len(bomb) < 100_000
    assert answer.status_code == 413


async def test_other_triton_extensions_are_clearly_unsupported(running: Running) -> None:
    for path in ("/v2/systemsharedmemory/status", "/v2/trace/setting", "/v2/logging"):
        answer = await running.http.get(path)
        assert answer.status_code == 400
        assert "not supported" in answer.json()["error"]
    async with tritonclient.grpc.aio.InferenceServerClient(running.grpc_address) as client:
        with pytest.raises(InferenceServerException, match="not implemented"):
            await client.get_trace_settings()


async def test_a_request_s_own_timeout_ends_it(running: Running, fake: FakeEngine) -> None:
    fake.stall_after = 2
    inputs = tensors(tritonclient.http, text_input=b"x")
    async with tritonclient.http.aio.InferenceServerClient(running.http_address) as client:
        with pytest.raises(InferenceServerException, match="timeout is over"):
            await client.infer("tiny", inputs, timeout=20_000)
    await eventually(lambda: fake.in_flight() == 0)


async def test_grpc_errors_have_the_fitting_code(running: Running, fake: FakeEngine) -> None:
    inputs = tensors(tritonclient.grpc, text_input=b"x")
    async with tritonclient.grpc.aio.InferenceServerClient(running.grpc_address) as client:
        for code, model, refusal in (
            ("NOT_FOUND", "other", None),
            ("RESOURCE_EXHAUSTED", "tiny", EngineBusyError("full", retry_after_s=1)),
            ("INTERNAL", "tiny", ValueError("a secret path")),
        ):
            fake.refuse = refusal
            with pytest.raises(InferenceServerException) as caught:
                await client.infer(model, inputs)
            assert caught.value.status() == f"StatusCode.{code}"
            assert "secret" not in str(caught.value)


async def test_grpc_health_tells_the_engine_s_state(running: Running, fake: FakeEngine) -> None:
    async with grpc.aio.insecure_channel(running.grpc_address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
        name = b"inference.GRPCInferenceService"
        assert await check(b"") == b"\x08\x01"
        assert await check(b"\x0a" + bytes([len(name)]) + name) == b"\x08\x01"
        assert await watch.read() == b"\x08\x01"
        fake.alive = False
        assert await check(b"") == b"\x08\x02"
        assert await watch.read() == b"\x08\x02"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(b"\x0a\x01x")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
