"""Embeddings, and the tokenizer over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import pytest_asyncio
import torch
from transformers import AutoModel

from tests.fixtures.runtime_server import Running, running_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(folder: Path) -> AsyncIterator[Running]:
    async with running_tiny_model(folder, max_num_batched_tokens=64) as running:
        yield running


def reference(folder: Path, token_ids: list[int]) -> np.ndarray:
    model = AutoModel.from_pretrained(folder / "tiny", dtype=torch.float32)
    with torch.inference_mode():
        hidden = model(torch.tensor([token_ids])).last_hidden_state[0, -1].numpy()
    return hidden / np.linalg.norm(hidden)


async def test_an_embedding_is_the_last_hidden_state_of_transformers(
    running: Running, folder: Path
) -> None:
    texts = ["a", "The quick brown fox. " * 8, "The quick brown fox. " * 8 + "!"]
    tokenizer = running.service.engine.tokenizer
    async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="none") as client:
        both = [
            await client.embeddings.create(model="tiny", input=texts),  # asks for base64
            await client.embeddings.create(model="tiny", input=texts, encoding_format="float"),
        ]
    for answer in both:
        assert answer.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in texts)
        for text, entry in zip(texts, answer.data, strict=True):
            expected = reference(folder, tokenizer.encode(text))
            np.testing.assert_allclose(entry.embedding, expected, atol=1e-5)
    assert running.service.engine.in_flight() == 0


async def test_a_thousand_inputs_at_a_time_fill_no_queue(running: Running) -> None:
    body = {"model": "tiny", "input": ["x"] * 1000, "encoding_format": "base64"}
    answer = (await running.http.post("/v1/embeddings", json=body, timeout=120)).json()
    assert [entry["index"] for entry in answer["data"]] == list(range(1000))
    assert len({entry["embedding"] for entry in answer["data"]}) == 1


async def test_embedding_beside_text_leaves_the_text_alone(running: Running) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    alone = await running.http.post("/v1/completions", json=body)
    together, *_ = await asyncio.gather(
        running.http.post("/v1/completions", json=body),
        *(running.http.post("/v1/embeddings", json={"model": "tiny", "input": t}) for t in "abc"),
    )
    assert together.json()["choices"][0]["text"] == alone.json()["choices"][0]["text"]


async def test_tokens_go_to_text_and_back(running: Running) -> None:
    asked = {"model": "tiny", "prompt": "Größe", "return_token_strs": True}
    answer = (await running.http.post("/tokenize", json=asked)).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == 7
    assert answer["max_model_len"] == 512
    back = await running.http.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": "Größe"}
    chat = {"messages": [{"role": "user", "content": "x"}]}
    tokens = (await running.http.post("/tokenize", json=chat)).json()["tokens"]
    text = (await running.http.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
    assert text == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


BAD: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "no input": ("/v1/embeddings", {"model": "tiny", "input": []}, 400, "input"),
    "too many": ("/v1/embeddings", {"model": "tiny", "input": ["x"] * 2049}, 400, "at most 2048"),
    "too long": ("/v1/embeddings", {"model": "tiny", "input": "x" * 600}, 400, "600 tokens"),
    "a name": ("/v1/embeddings", {"model": "gpt", "input": "x"}, 404, "Served now: tiny"),
    "no such token": ("/v1/embeddings", {"model": "tiny", "input": [10**6]}, 400, "go up to"),
    "nothing to tokenize": ("/tokenize", {}, 400, "either prompt or messages"),
    "both": ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, ""),
    "a strange token": ("/detokenize", {"tokens": [10**6]}, 400, "go up to"),
}


@pytest.mark.parametrize(("path", "body", "status", "text"), BAD.values(), ids=BAD)
async def test_bad_input_is_told(
    running: Running, path: str, body: dict[str, Any], status: int, text: str
) -> None:
    answer = await running.http.post(path, json=body)
    assert answer.status_code == status
    assert text in answer.json()["error"]["message"]
