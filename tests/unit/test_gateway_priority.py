"""A request's priority in the runtime: a client may wait longer than its key says, never less."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from mizzen.runtime.gateway.body import engine_priority
from mizzen.runtime.gateway.keys import hash_key, make_key
from tests.fixtures.gateway_house import CHAT, MakeHouse, open_houses


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


# What the client gives, its key's priority (a higher one goes first), the runtime's (a lower one).
PRIORITIES = {
    "nothing is given": (None, 0, 0),
    "a key goes first": (None, 5, -5),
    "a key goes last": (None, -5, 5),
    "a client lets others go first": (7, 0, 7),
    "a client of an urgent key lets others of it go first": (-2, 5, -2),
    "a client wants to go first": (-7, 0, 0),
    "a client of a slow key wants to go first": (0, -5, 5),
    "a text is no number": ("-7", 0, 0),
    "a fraction is no integer": (-7.0, 0, 0),
    "a truth is no number": (True, -5, 5),
}


@pytest.mark.parametrize(("given", "key", "expected"), PRIORITIES.values(), ids=PRIORITIES)
def test_the_later_of_what_is_given_and_what_the_key_may(
    given: object, key: int, expected: int
) -> None:
    assert engine_priority(given, key) == expected


@pytest.mark.parametrize("given", [-7, "-7", -7.0])
async def test_a_client_cannot_go_before_other_users_of_a_replica(
    make_house: MakeHouse, given: object
) -> None:
    house = await make_house([])
    assert (await house.ask(priority=given, keep=1))[0] == 200
    [sent] = (json.loads(body) for body in house.replicas[0].bodies)
    assert (sent["priority"], sent["keep"], sent["model"]) == (0, 1, "tiny")


async def test_what_need_not_change_reaches_the_replica_byte_for_byte(
    make_house: MakeHouse,
) -> None:
    house = await make_house([])
    asked = b'{"model" : "tiny",\n "messages": []}'
    async with house.client.post(house.url + CHAT, data=asked) as answer:
        assert answer.status == 200
    assert house.replicas[0].bodies == [asked]


async def test_a_key_s_priority_is_the_replica_s_too_but_where_it_knows_none(
    make_house: MakeHouse, tmp_path
) -> None:
    key, file = make_key(), tmp_path / "keys"
    file.write_text(f"urgent {hash_key(key)} priority=5\n")
    house = await make_house([], auth="on", keys_file=file)
    for path in (CHAT, "/v1/embeddings"):
        async with house.client.post(
            house.url + path, json={"model": "tiny"}, headers={"Authorization": f"Bearer {key}"}
        ) as answer:
            assert answer.status == 200
    chat, embedding = (json.loads(body) for body in house.replicas[0].bodies)
    assert chat == {"model": "tiny", "priority": -5}
    assert embedding == {"model": "tiny"}
