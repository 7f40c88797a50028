"""How batches are run: beside everybody else's requests, stopped, and gone on with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mizzen.runtime.gateway.batches.shelf import Shelf
from mizzen.runtime.gateway.guardrails import Guardrail
from mizzen.runtime.gateway.keys import hash_key, make_key
from mizzen.runtime.gateway.limits import parse_limits
from tests.fixtures.batches import (
    UNRUN,
    answers,
    begin,
    client_of,
    contents,
    ended,
    jsonl,
    line,
)
from tests.fixtures.gateway_house import CHAT, MODEL, MakeHouse, open_houses, until


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


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


@pytest.mark.parametrize("retries", [0, 2])
async def test_a_batch_leaves_half_of_a_key_s_requests_to_its_others(
    make_house: MakeHouse, tmp_path: Path, retries: int
) -> None:
    key, file, limits = make_key(), tmp_path / "keys", "requests-per-minute=4"
    file.write_text(f"mine {hash_key(key)} {limits}\n")
    script = ["busy_for_a_moment"] * retries
    house = await make_house(script, auth="on", keys_file=file, batches_dir=tmp_path / "v")
    account = house.gateway.accounts.of(f"{file}:mine", parse_limits(limits))
    now = account.clock()
    account.clock = lambda: now  # nothing refills
    client = client_of(house, key)
    made = await begin(client, jsonl(*map(line, range(4))))
    shelf = Shelf(tmp_path / "v", f"{file}:mine")
    await until(lambda: (shelf.batch(made.id) or UNRUN).completed >= 2)
    body, headers = {"model": "tiny", "messages": []}, {"Authorization": f"Bearer {key}"}
    for status in (200, 200, 429):
        async with house.client.post(house.url + CHAT, json=body, headers=headers) as answer:
            assert answer.status == status
    assert (await client.batches.retrieve(made.id)).request_counts.completed == 2


async def test_a_model_that_is_off_stops_its_own_batches_and_no_others(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    house = await make_house([], batches_dir=tmp_path, batches_parallel=1)
    house.serve(model=replace(MODEL, deployment="off", name="off"))
    client = client_of(house)
    waits = await begin(client, jsonl(line(0, body={"model": "off", "messages": []})))
    await until(lambda: house.sample("mizzen_gateway_arrivals_total", model="off"))
    assert (await ended(client, (await begin(client, jsonl(line(0)))).id)).status == "completed"
    assert (await client.batches.retrieve(waits.id)).status == "in_progress"


class BrokenGuardrail(Guardrail):
    """Has a bug that one text shows."""

    def first_hit(self, text: str) -> int | None:
        if text == "question 1":
            raise RuntimeError("a bug")
        return None


async def test_a_line_that_the_gateway_fails_at_is_an_error_of_its_own(
    make_house: MakeHouse, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    house = await make_house([], batches_dir=tmp_path)
    rail = BrokenGuardrail("broken", is_output=False)
    house.serve(*house.replicas, model=replace(MODEL, guardrails=(rail,)))
    client = client_of(house)
    batch = await ended(client, (await begin(client, jsonl(*map(line, range(3))))).id)
    assert batch.status == "completed"
    assert (await answers(client, batch.output_file_id)).keys() == {"line-0", "line-2"}
    failed = (await answers(client, batch.error_file_id))["line-1"]["response"]
    assert failed["status_code"] == 500
    assert f"its log says why under {failed['request_id']}" in failed["body"]["error"]["message"]
    assert failed["request_id"] in caplog.text
    assert "RuntimeError: a bug" in caplog.text


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


@pytest.mark.parametrize("expires_at_s", [2**40, 1], ids=["in time", "after its time"])
async def test_a_batch_whose_input_is_gone_fails_and_keeps_the_answers_it_has(
    make_house: MakeHouse, tmp_path: Path, expires_at_s: int
) -> None:
    house = await make_house(["good", "silent"], batches_dir=tmp_path, batches_parallel=1)
    made = await begin(client_of(house), jsonl(*map(line, range(3))))
    await until(lambda: len(house.replicas[0].seen) == 2)
    await house.gateway.close()
    shelf = Shelf(tmp_path, "")
    begun = shelf.batch(made.id)
    assert begun is not None
    shelf.put_batch(replace(begun, expires_at_s=expires_at_s))
    shelf.delete_file(made.input_file_id)
    house = await make_house([], batches_dir=tmp_path)
    client = client_of(house)
    batch = await ended(client, made.id)
    assert batch.status == "failed"
    assert [error.code for error in batch.errors.data] == ["input_file_missing"]
    assert (await answers(client, batch.output_file_id)).keys() == {"line-0"}
    assert not house.replicas[0].seen
