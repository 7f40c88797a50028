"""The server with the real engine and a random model of two layers: what fakes cannot show."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
import torch
import tritonclient.grpc.aio

from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.operator.planning.model_shape import read_model_shape
from mizzen.operator.status.fit import fit_document
from mizzen.runtime.engine.api import BACKGROUND_PRIORITY, GenerationRequest, SamplingParams
from mizzen.runtime.model.lora import LoraConfig, save_adapter
from mizzen.runtime.model.lora.adapter import Adapter, Pair, Site
from mizzen.runtime.train.digest import digest_of, hash_files
from tests.fixtures.runtime_server import Running, eventually, running_tiny_model
from tests.fixtures.triton_tensors import tensors

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me a long story."}]
LONG = {"model": "tiny", "messages": MESSAGES, "ignore_eos": True, "max_tokens": 1900}
SHORT = {"model": "tiny", "messages": MESSAGES, "ignore_eos": True, "max_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(folder: Path) -> AsyncIterator[Running]:
    async with running_tiny_model(
        folder, context=2048, own_process=True, adapter_root=[folder]
    ) as running:
        yield running


def config_in(folder: Path) -> dict[str, Any]:
    [file] = folder.rglob("config.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


async def metric(running: Running, name: str, **labels: str) -> float:
    text = (await running.admin.get("/metrics")).text
    for line in text.splitlines():
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        if line.startswith(name + "{") and all(part in line for part in wanted):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no series {name} {labels}")


async def leave_sse(running: Running) -> None:
    async with running.http.stream("POST", CHAT, json=LONG | {"stream": True}) as answer:
        async for _ in answer.aiter_lines():
            break


async def leave_call(running: Running, call: Awaitable[Any], *, sequences: int) -> None:
    task = asyncio.ensure_future(call)
    await eventually(lambda: running.service.engine.stats().running == sequences)
    task.cancel()
    await asyncio.wait((task,))


async def leave_http(running: Running) -> None:
    await leave_call(running, running.http.post(CHAT, json=LONG | {"n": 2}), sequences=2)


async def leave_oip_http(running: Running) -> None:
    values = {"text_input": "x", "sampling_parameters": OIP_LONG}
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [1], "data": [value]}
        for name, value in values.items()
    ]
    call = running.http.post("/v2/models/tiny/infer", json={"inputs": inputs})
    await leave_call(running, call, sequences=1)


OIP_LONG = json.dumps({"max_tokens": 1900, "ignore_eos": True})


def long_inputs(*, stream: bool) -> list[Any]:
    return tensors(
        tritonclient.grpc.aio,
        text_input=b"x",
        stream=stream,
        sampling_parameters=OIP_LONG.encode(),
    )


async def leave_grpc(running: Running) -> None:
    async with tritonclient.grpc.aio.InferenceServerClient(running.grpc_address) as client:
        call = client.infer("tiny", long_inputs(stream=False))
        await leave_call(running, call, sequences=1)


async def leave_grpc_stream(running: Running) -> None:
    async def one() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "tiny", "inputs": long_inputs(stream=True)}
        await asyncio.Event().wait()  # the client keeps its side open

    async with tritonclient.grpc.aio.InferenceServerClient(running.grpc_address) as client:
        answers = client.stream_infer(one())
        async for _ in answers:
            answers.cancel()
            break


LEAVES: dict[str, tuple[Callable[[Running], Awaitable[None]], int]] = {
    "SSE": (leave_sse, 1),
    "unary HTTP": (leave_http, 2),
    "Open Inference HTTP": (leave_oip_http, 1),
    "unary gRPC": (leave_grpc, 1),
    "gRPC stream": (leave_grpc_stream, 1),
}


@pytest.mark.parametrize(("leave", "sequences"), LEAVES.values(), ids=LEAVES)
async def test_a_client_that_leaves_frees_its_blocks(
    running: Running, leave: Callable[[Running], Awaitable[None]], sequences: int
) -> None:
    aborted = await metric(running, "vllm:request_success_total", finished_reason="abort")
    generated = running.service.engine.stats().generation_tokens
    await leave(running)

    def is_free() -> bool:
        stats = running.service.engine.stats()
        return stats.running + stats.waiting == 0 and stats.blocks_free == stats.blocks_total

    await eventually(is_free)
    assert running.service.in_flight() == 0
    # Ended by the server, not by having reached their last token.
    ended = -1.0
    async with asyncio.timeout(300):  # the figures come with the engine's next report
        while ended != aborted + sequences:
            ended = await metric(running, "vllm:request_success_total", finished_reason="abort")
    assert running.service.engine.stats().generation_tokens < generated + 1900 * sequences


async def test_the_openai_package_chats_and_streams(running: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        options: dict[str, Any] = {
            "model": "tiny",
            "messages": MESSAGES,
            "temperature": 0,
            "max_tokens": 12,
            "extra_body": {"ignore_eos": True},
        }
        whole = await client.chat.completions.create(**options)
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 12
        stream = await client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage.model_copy(
            update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
        )


async def test_the_sync_openai_package_completes_with_seed_and_logprobs(running: Running) -> None:
    def session() -> list[Any]:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            return [
                client.completions.create(
                    model="tiny", prompt="Ahoi", seed=5, max_tokens=6, logprobs=2, n=2
                )
                for _ in range(2)
            ]

    first, second = await asyncio.to_thread(session)
    texts = [[choice.text for choice in answer.choices] for answer in (first, second)]
    assert texts[0] == texts[1]
    logprobs = first.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs)
    assert all(value <= 0 for value in logprobs.token_logprobs)


async def test_the_openai_package_raises_its_own_errors(running: Running) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{running.url}/v1", api_key="none", max_retries=0
    ) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            await create(model="other", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as caught:
            await create(model="tiny", messages=MESSAGES, max_tokens=-1)
        assert caught.value.param == "max_tokens"
        with pytest.raises(openai.BadRequestError) as caught:
            await create(model="tiny", messages=[{"role": "user", "content": "x" * 5000}])
        assert caught.value.code == "context_length_exceeded"
        assert "2048" in str(caught.value)


async def test_more_tokens_than_the_context_holds_end_with_length(running: Running) -> None:
    answer = (await running.http.post(CHAT, json=LONG | {"max_tokens": 5000})).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 2048


async def test_metrics_follow_the_requests(running: Running) -> None:
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    histograms = (
        "vllm:time_to_first_token_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_generation_tokens_count",
    )
    before = {name: await metric(running, name) for name in (*names, *histograms)}
    usage = (await running.http.post(CHAT, json=SHORT)).json()["usage"]
    after = {name: await metric(running, name) for name in (*names, *histograms)}
    assert after[names[0]] - before[names[0]] == usage["prompt_tokens"]
    assert after[names[1]] - before[names[1]] == usage["completion_tokens"] == 8
    assert all(after[name] == before[name] + 1 for name in histograms)
    assert await metric(running, "vllm:cache_config_info", block_size="16") == 1


async def test_sixteen_streams_at_once_all_end(running: Running) -> None:
    async def one(number: int) -> str:
        asked = SHORT | {"stream": True, "seed": number}
        return (await running.http.post(CHAT, json=asked)).text

    answers = await asyncio.gather(*(one(number) for number in range(16)))
    assert all(answer.endswith("data: [DONE]\n\n") for answer in answers)
    assert running.service.in_flight() == 0


def write_adapter(folder: Path) -> str:
    """Write a random adapter of the tiny model and return its digest."""
    torch.manual_seed(0)
    pairs = {
        Site(layer, "o_proj"): Pair(torch.randn(4, 64), torch.randn(64, 4)) for layer in range(2)
    }
    config = LoraConfig(rank=4, alpha=8, targets=("o_proj",))
    save_adapter(folder, Adapter(config, pairs), base_model="tiny")
    return f"sha256:{digest_of(hash_files(folder))}"


async def test_an_adapter_changes_the_answer_until_it_is_unloaded(
    running: Running, folder: Path
) -> None:
    digest = write_adapter(folder / "support")
    base = SHORT | {"temperature": 0, "logprobs": True, "top_logprobs": 5}

    async def answer(model: str) -> list[float]:
        body = (await running.http.post(CHAT, json=base | {"model": model})).json()
        return [token["logprob"] for token in body["choices"][0]["logprobs"]["content"]]

    def as_before(logprobs: list[float]) -> Any:
        # The second time the prompt is cached, and sums over fewer tokens round otherwise.
        return pytest.approx(logprobs, abs=1e-4)

    before = await answer("tiny")
    async with tritonclient.grpc.aio.InferenceServerClient(running.grpc_address) as client:
        config = json.dumps({"parameters": {"path": str(folder / "support"), "digest": digest}})
        await client.load_model("support", config=config)
        listed = (await running.admin.get("/adapters")).json()["adapters"]
        assert [(adapter["name"], adapter["digest"]) for adapter in listed] == [("support", digest)]
        adapted = await answer("tiny:support")
        assert adapted != as_before(before)
        assert await answer("support") == as_before(adapted)
        assert await answer("tiny") == as_before(before)
        await client.unload_model("support")
    gone = await running.http.post(CHAT, json=base | {"model": "tiny:support"})
    assert gone.status_code == 404


async def test_the_admin_port_tells_the_operator_what_the_model_takes(
    running: Running, folder: Path
) -> None:
    told = (await running.admin.get("/model")).json()
    shape = read_model_shape(config_in(folder))
    assert told["parameters"] == shape.parameters
    assert (told["layers"], told["kvHeads"]) == (shape.layers, shape.kv_heads)
    spec = LLMDeploymentSpec.parse({"model": {"source": "pvc://models/tiny"}})
    plan = fit_document(told, spec, revision="r1")
    assert plan is not None
    assert plan["kvBytesPerToken"] == shape.kv_bytes_per_token(told["dtype"])
    assert plan["kvTokens"] >= plan["maxModelLen"] == told["maxModelLen"]


async def test_work_in_the_background_is_nobodys_demand(tmp_path: Path) -> None:
    async with running_tiny_model(tmp_path) as server:
        engine = server.service.engine
        seen = []
        for priority in (0, BACKGROUND_PRIORITY):
            request = GenerationRequest(
                request_id=str(priority),
                prompt_token_ids=(5, 6, 7),
                sampling=SamplingParams(max_tokens=50, ignore_eos=True),
                priority=priority,
            )
            outputs = engine.generate(request)
            await anext(outputs)
            stats = engine.stats()
            seen.append((stats.running + stats.waiting, engine.in_flight(), stats.prompt_tokens))
            await outputs.aclose()
            await eventually(lambda: engine.in_flight() == 0)
        assert seen == [(1, 1, 3), (0, 1, 3)]
