"""Files and batches as a client sees them, through a real gateway, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import FormData

from mizzen.runtime.gateway.keys import hash_key, make_key
from tests.fixtures.batches import answers, begin, client_of, contents, ended, jsonl, line
from tests.fixtures.gateway_house import CHAT, MakeHouse, open_houses, until
from tests.fixtures.runtime_server import running_tiny_model


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


# What a client sees.


async def test_a_batch_is_answered_line_by_line(make_house: MakeHouse, tmp_path: Path) -> None:
    house = await make_house([], batches_dir=tmp_path)
    client = client_of(house)
    unknown = line(2, body={"model": "nobody", "messages": []})
    made = await begin(client, jsonl(line(0), line(1), unknown), metadata={"for": "a test"})
    batch = await ended(client, made.id)
    assert (batch.status, batch.metadata) == ("completed", {"for": "a test"})
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
    good = await answers(client, batch.output_file_id)
    assert good.keys() == {"line-0", "line-1"}
    assert good["line-0"]["response"]["status_code"] == 200
    assert good["line-0"]["response"]["body"] == {"from": "0"}
    bad = await answers(client, batch.error_file_id)
    assert bad["line-2"]["response"]["status_code"] == 404
    assert bad["line-2"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert [one.id async for one in await client.batches.list(limit=1)] == [batch.id]
    # Above what any key or client gets: the runtime puts every other request before these.
    assert {json.loads(body)["priority"] for body in house.replicas[0].bodies} == {1000}


async def test_a_file_can_be_listed_read_and_deleted(make_house: MakeHouse, tmp_path: Path) -> None:
    client = client_of(await make_house(batches_dir=tmp_path))
    made = [
        await client.files.create(file=(f"{n}.jsonl", jsonl(line(n))), purpose="batch")
        for n in range(3)
    ]
    assert {stored.id async for stored in await client.files.list(limit=2)} == {
        stored.id for stored in made
    }
    assert (await client.files.retrieve(made[1].id)).filename == "1.jsonl"
    assert (await client.files.content(made[1].id)).content == jsonl(line(1))
    assert (await client.files.delete(made[1].id)).deleted
    with pytest.raises(openai.NotFoundError, match="No file 'file-"):
        await client.files.retrieve(made[1].id)


@pytest.mark.parametrize("limit", ["0", "-1", "x", "101", "9" * 5000], ids=lambda text: text[:3])
async def test_a_limit_that_is_none_is_a_400(
    make_house: MakeHouse, tmp_path: Path, limit: str
) -> None:
    house = await make_house(batches_dir=tmp_path)
    async with house.client.get(f"{house.url}/v1/batches?limit={limit}") as answer:
        assert answer.status == 400
        assert "must be a number from 1 to 100" in (await answer.json())["error"]["message"]


async def test_without_a_volume_the_answer_names_the_setting(make_house: MakeHouse) -> None:
    client = client_of(await make_house())
    with pytest.raises(openai.InternalServerError, match=r"gateway\.batches\.volume") as raised:
        await client.files.list()
    assert (raised.value.status_code, raised.value.code) == (501, "batches_not_enabled")


async def test_what_a_key_has_made_no_other_key_can_see(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    keys = {name: make_key() for name in ("mine", "other")}
    file = tmp_path / "keys"
    file.write_text("".join(f"{name} {hash_key(key)}\n" for name, key in keys.items()))
    house = await make_house([], auth="on", keys_file=file, batches_dir=tmp_path / "volume")
    mine, other = (client_of(house, key) for key in keys.values())
    batch = await ended(mine, (await begin(mine, jsonl(line(0)))).id)
    assert batch.status == "completed"
    for call in (
        other.files.retrieve(batch.input_file_id),
        other.files.content(batch.output_file_id),
        other.files.delete(batch.input_file_id),
        other.batches.retrieve(batch.id),
        other.batches.cancel(batch.id),
        other.batches.create(
            input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"
        ),
    ):
        with pytest.raises(openai.NotFoundError):
            await call
    assert not (await other.files.list()).data and not (await other.batches.list()).data


async def test_the_real_runtime_answers_chats_completions_and_embeddings_of_batches(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    async with running_tiny_model(tmp_path / "model", served_model_name="tiny") as running:
        house = await make_house(upstream=[f"tiny={running.url}"], batches_dir=tmp_path / "volume")
        client = client_of(house)
        bodies = {
            CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
            "/v1/completions": {"prompt": "x", "max_tokens": 2},
            "/v1/embeddings": {"input": "x"},
        }
        for endpoint, fields in bodies.items():
            asked = line(0, url=endpoint, body={"model": "local/tiny", **fields})
            batch = await ended(client, (await begin(client, jsonl(asked), endpoint=endpoint)).id)
            good = await answers(client, batch.output_file_id)
            assert good["line-0"]["response"]["body"]["usage"]["prompt_tokens"] > 0


# What is refused.

BAD_LINES = {
    "no JSON": (b"{nope\n", "invalid_json_line", 1),
    "a list": (jsonl([1]), "invalid_json_line", 1),
    "no custom_id": (jsonl(line(0), line(1, custom_id=None)), "missing_required_parameter", 2),
    "a custom_id twice": (jsonl(line(0), line(0)), "duplicate_custom_id", 2),
    "another method": (jsonl(line(0, method="GET")), "invalid_method", 1),
    "another endpoint": (jsonl(line(0, url="/v1/embeddings")), "mismatched_endpoint", 1),
    "no model": (jsonl(line(0, body={"messages": []})), "invalid_request", 1),
    "no body": (jsonl(line(0, body=None)), "invalid_request", 1),
    "a stream": (jsonl(line(0, body={"model": "tiny", "stream": True})), "invalid_request", 1),
    "too many lines": (jsonl(*map(line, range(4))), "too_many_requests", 4),
    "a line too long": (
        jsonl(line(0, body={"model": "tiny", "x": "x" * 2**20})),
        "request_too_large",
        1,
    ),
    "nothing": (b"\n", "empty_file", None),
}


@pytest.mark.parametrize(("content", "code", "number"), BAD_LINES.values(), ids=BAD_LINES)
async def test_a_batch_with_a_line_that_cannot_be_run_fails_before_the_first_one(
    make_house: MakeHouse, tmp_path: Path, content: bytes, code: str, number: int | None
) -> None:
    house = await make_house([], batches_dir=tmp_path, batches_max_lines=3, max_body_mib=1)
    client = client_of(house)
    batch = await ended(client, (await begin(client, content)).id)
    assert batch.status == "failed"
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, number)]
    assert batch.errors.data[0].message
    assert not house.replicas[0].seen


BAD_BATCHES = {
    "an endpoint it does not have": ({"endpoint": "/v1/responses"}, "'endpoint' must be one of"),
    "a window it does not know": ({"completion_window": "1 day"}, "must be hours"),
    "a window too long": ({"completion_window": "999h"}, "must be hours"),
    "an unknown field": ({"extra_body": {"nope": 1}}, "Unknown field 'nope'"),
    "metadata that is no text": ({"metadata": {"a": 1}}, "'metadata' must be"),
}


@pytest.mark.parametrize(("fields", "says"), BAD_BATCHES.values(), ids=BAD_BATCHES)
async def test_a_batch_that_cannot_be_is_refused_with_what_to_change(
    make_house: MakeHouse, tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    client = client_of(await make_house(batches_dir=tmp_path))
    with pytest.raises(openai.BadRequestError, match=says):
        await begin(client, jsonl(line(0)), **fields)


def form(**fields: Any) -> dict[str, Any]:
    data = FormData(quote_fields=False, default_to_multipart=True)
    for name, (content, filename) in fields.items():
        data.add_field(name, content, filename=filename)
    return {"data": data}


BAD_FORMS = (
    (lambda: {"json": {"purpose": "batch"}}, "multipart/form-data"),
    (lambda: form(purpose=("batch", None)), "has no field 'file'"),
    (lambda: form(file=("x", None)), "one field 'file', with a file name"),
    (lambda: form(other=("x", None)), "Unknown field"),
)


async def test_an_upload_that_is_none_is_refused_and_leaves_nothing(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    house = await make_house(batches_dir=tmp_path, batches_max_file_mib=1)
    client = client_of(house)
    with pytest.raises(openai.BadRequestError, match=r"'purpose' must be \"batch\""):
        await client.files.create(file=b"x", purpose="assistants")
    with pytest.raises(openai.APIStatusError, match="larger than 1 MiB") as raised:
        await client.files.create(file=b"x" * (2**20 + 1), purpose="batch")
    assert raised.value.status_code == 413
    for sent, says in BAD_FORMS:
        async with house.client.post(house.url + "/v1/files", **sent()) as answer:
            assert answer.status == 400
            assert says in (await answer.json())["error"]["message"]
    assert not contents(tmp_path)


async def test_an_upload_that_dribbles_in_is_given_up(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    house = await make_house(batches_dir=tmp_path, body_timeout_s=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", house.gateway.port)
    writer.write(
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n"
        b"Content-Type: multipart/form-data; boundary=B\r\n\r\n"
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nsome'
    )
    async with asyncio.timeout(60):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()
    await until(lambda: not contents(tmp_path))


async def test_a_batch_that_has_ended_cannot_be_cancelled(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    client = client_of(await make_house([], batches_dir=tmp_path))
    batch = await ended(client, (await begin(client, jsonl(line(0)))).id)
    with pytest.raises(openai.ConflictError, match="has ended: it is completed"):
        await client.batches.cancel(batch.id)
