"""Files and batches through a real gateway, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import FormData
from openai import AsyncOpenAI

from mizzen.runtime.gateway.batches.records import Batch, StoredFile
from mizzen.runtime.gateway.batches.shelf import Shelf, claim
from mizzen.runtime.gateway.keys import hash_key, make_key
from mizzen.runtime.gateway.server import Gateway
from tests.fixtures.gateway_house import CHAT, House, MakeHouse, open_houses, until
from tests.fixtures.runtime_server import running_tiny_model


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


UNRUN = Batch(
    id="batch_" + "0" * 32,
    owner="me",
    endpoint=CHAT,
    input_file_id="file-" + "0" * 32,
    completion_window="24h",
    created_at_s=0,
    expires_at_s=2**40,
)


def client_of(house: House, key: str = "none") -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{house.url}/v1", api_key=key, max_retries=0)


def line(number: int, **changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"question {number}"}]}
    return {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body, **changes}


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def contents(volume: Path) -> list[Path]:
    return list(volume.rglob("*.data"))


async def begin(client: AsyncOpenAI, content: bytes, **fields: Any) -> Any:
    stored = await client.files.create(file=("in.jsonl", content), purpose="batch")
    asked = {"endpoint": CHAT, "completion_window": "24h", **fields}
    return await client.batches.create(input_file_id=stored.id, **asked)


async def ended(client: AsyncOpenAI, batch_id: str) -> Any:
    async with asyncio.timeout(60):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in ("completed", "failed", "expired", "cancelled"):
                return batch
            await asyncio.sleep(0.05)


async def answers(client: AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    text = (await client.files.content(file_id)).text
    return {entry["custom_id"]: entry for entry in map(json.loads, text.splitlines())}


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
    # The runtime's own scheduler puts every other request before these.
    assert {json.loads(body)["priority"] for body in house.replicas[0].bodies} == {2**31 - 1}


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


async def test_a_batch_ends_with_the_key_that_made_it(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    key, file = make_key(), tmp_path / "keys"
    file.write_text(f"mine {hash_key(key)}\n")
    house = await make_house("silent", auth="on", keys_file=file, batches_dir=tmp_path / "v")
    made = await begin(client_of(house, key), jsonl(line(0)))
    await until(lambda: house.replicas[0].seen)
    house.gateway.keyring.replace(str(file), {})
    shelf = Shelf(tmp_path / "v", f"{file}:mine")
    await until(lambda: (shelf.batch(made.id) or made).status == "failed")
    batch = shelf.batch(made.id)
    assert batch is not None and batch.errors[0]["code"] == "key_removed"


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


# Beside others.


async def test_a_client_s_request_goes_before_every_line_that_waits(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    house = await make_house(
        ["silent"], batches_dir=tmp_path, replica_requests=1, queue_timeout_s=60
    )
    client = client_of(house)
    made = await begin(client, jsonl(*map(line, range(4))))
    replica, room = house.replicas[0], house.gateway.admission.room
    await until(lambda: replica.seen and room.held(("team", "tiny")) == 3)
    asking = asyncio.create_task(house.ask(user="somebody"))
    await until(lambda: room.held(("team", "tiny")) == 4)
    replica.may_continue.set()
    assert (await asking)[0] == 200
    assert (await ended(client, made.id)).status == "completed"
    assert json.loads(replica.bodies[1]).get("user") == "somebody"


async def test_no_more_lines_run_at_one_time_than_the_setting_says(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    house = await make_house("silent", batches_dir=tmp_path, batches_parallel=2)
    client, replica = client_of(house), house.replicas[0]
    made = [await begin(client, jsonl(*map(line, range(3)))) for _ in range(2)]
    await until(lambda: len(replica.seen) == 2)
    await asyncio.sleep(0.2)
    assert len(replica.seen) == 2
    replica.may_continue.set()
    for batch in made:
        assert (await ended(client, batch.id)).status == "completed"
    assert len(replica.seen) == 6


async def test_a_line_waits_for_a_busy_model_and_a_broken_one_is_asked_three_times(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    house = await make_house(
        ["busy_for_a_moment", "good", "crashed", "crashed", "crashed"],
        batches_dir=tmp_path,
        batches_parallel=1,
    )
    client = client_of(house)
    batch = await ended(client, (await begin(client, jsonl(line(0), line(1)))).id)
    assert (await answers(client, batch.output_file_id)).keys() == {"line-0"}
    bad = await answers(client, batch.error_file_id)
    assert bad["line-1"]["response"]["status_code"] == 500
    assert len(house.replicas[0].seen) == 5


# Stopping and going on.


async def test_a_cancelled_batch_keeps_the_answers_it_has(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    house = await make_house(["good", "silent"], batches_dir=tmp_path, batches_parallel=1)
    client, replica = client_of(house), house.replicas[0]
    made = await begin(client, jsonl(*map(line, range(3))))
    await until(lambda: len(replica.seen) == 2)
    assert (await client.batches.cancel(made.id)).status == "cancelling"
    batch = await ended(client, made.id)
    assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
    assert (await answers(client, batch.output_file_id)).keys() == {"line-0"}
    await asyncio.wait_for(replica.cancelled.wait(), 60)


async def test_a_batch_that_is_cancelled_before_anybody_ran_it_runs_no_line(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    shelf = Shelf(tmp_path, "")
    batch = replace(UNRUN, owner="")
    shelf.data(batch.input_file_id).write_bytes(jsonl(line(0)) + b"{nope\n")
    shelf.put_batch(batch)
    shelf.cancel(batch, 7)
    house = await make_house([], batches_dir=tmp_path)
    seen = await ended(client_of(house), batch.id)
    assert (seen.status, seen.cancelling_at, seen.output_file_id) == ("cancelled", 7, None)
    assert not house.replicas[0].seen


async def test_lines_without_an_answer_in_time_are_in_the_error_file(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    house = await make_house(["good", "silent"], batches_dir=tmp_path, batches_parallel=1)
    client = client_of(house)
    made = await begin(client, jsonl(*map(line, range(3))))
    await until(lambda: len(house.replicas[0].seen) == 2)
    await house.gateway.close()
    # A day later, the next gateway.
    shelf = Shelf(tmp_path, "")
    begun = shelf.batch(made.id)
    assert begun is not None
    shelf.put_batch(replace(begun, expires_at_s=1))
    house = await make_house("silent", batches_dir=tmp_path)
    client = client_of(house)
    batch = await ended(client, made.id)
    assert batch.status == "expired"
    assert (await answers(client, batch.output_file_id)).keys() == {"line-0"}
    missed = await answers(client, batch.error_file_id)
    assert missed.keys() == {"line-1", "line-2"}
    assert {entry["error"]["code"] for entry in missed.values()} == {"batch_expired"}


async def test_the_next_gateway_goes_on_and_runs_no_answered_line_again(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    house = await make_house(["good", "good", "silent"], batches_dir=tmp_path, batches_parallel=1)
    made = await begin(client_of(house), jsonl(*map(line, range(5))))
    await until(lambda: len(house.replicas[0].seen) == 3)
    await house.gateway.close()
    [output] = (path for path in contents(tmp_path) if b'"response"' in path.read_bytes())
    output.write_bytes(output.read_bytes() + b'{"custom_id": "torn')
    house = await make_house([], batches_dir=tmp_path)
    client = client_of(house)
    batch = await ended(client, made.id)
    assert (batch.status, batch.request_counts.completed) == ("completed", 5)
    asked = [json.loads(b)["messages"][0]["content"] for b in house.replicas[0].bodies]
    assert sorted(asked) == ["question 2", "question 3", "question 4"]
    assert len(await answers(client, batch.output_file_id)) == 5


async def test_a_gateway_that_leaves_ends_the_lines_it_has_begun_and_begins_no_other(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    house = await make_house("silent", batches_dir=tmp_path, batches_parallel=1, drain_s=60)
    made = await begin(client_of(house), jsonl(*map(line, range(3))))
    await until(lambda: house.replicas[0].seen)
    leaving = asyncio.create_task(house.gateway.drain())
    await until(lambda: house.gateway.lifecycle.is_draining)
    house.replicas[0].may_continue.set()
    await leaving
    assert len(house.replicas[0].seen) == 1
    house = await make_house([], batches_dir=tmp_path)
    batch = await ended(client_of(house), made.id)
    assert batch.request_counts.completed == 3
    assert len(house.replicas[0].seen) == 2


async def test_two_gateways_on_one_volume_do_not_run_a_line_twice(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    houses = [await make_house([], batches_dir=tmp_path) for _ in range(2)]
    client = client_of(houses[0])
    made = [await begin(client, jsonl(*map(line, range(10)))) for _ in range(4)]
    for batch in made:
        seen = await ended(client_of(houses[1]), batch.id)
        assert seen.request_counts.completed == 10
    assert sum(len(house.replicas[0].seen) for house in houses) == 40


# The volume.


def test_one_claim_at_a_time_and_a_batch_that_was_never_written_down_is_let_go(
    tmp_path: Path,
) -> None:
    batch = UNRUN
    Shelf(tmp_path, "me").put_batch(batch)
    first = claim(tmp_path, batch.id)
    assert first is not None and first.owner == "me"
    assert not first.is_stray()
    assert claim(tmp_path, batch.id) is None
    first.release()
    again = claim(tmp_path, batch.id)
    assert again is not None
    again.finish()
    again.release()
    assert claim(tmp_path, batch.id) is None


async def test_what_is_older_than_the_setting_says_is_removed(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    shelf = Shelf(tmp_path, "")
    old = StoredFile("file-" + "a" * 32, "old", "batch", 1, created_at_s=0, expires_at_s=1)
    shelf.data(old.id).write_bytes(b"x")
    shelf.put_file(old)
    gateway: Gateway = (await make_house(batches_dir=tmp_path)).gateway
    await until(lambda: shelf.file(old.id) is None and not shelf.data(old.id).exists())
    assert gateway.config.batches_keep_days == 30


async def test_a_volume_that_fails_is_said_to_the_client(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    volume.write_text("not a folder")
    client = client_of(await make_house(batches_dir=volume))
    with pytest.raises(openai.InternalServerError, match="volume for files fails") as raised:
        await client.files.create(file=b"x", purpose="batch")
    assert raised.value.status_code == 507
