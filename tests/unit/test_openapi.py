"""The ports' descriptions: valid, complete, and true of what the server takes."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from hack.generate import openapi as generated
from mizzen.runtime.config import ServeConfig
from mizzen.runtime.server.access import Access
from mizzen.runtime.server.app import user_routes
from mizzen.runtime.server.metrics import Metrics
from mizzen.runtime.server.routes import GuardedRoute
from mizzen.runtime.server.service import Service
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.gateway_house import MakeHouse, open_houses
from tests.fixtures.runtime_server import Running, running_server


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with running_server(FakeEngine()) as running:
        yield running


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


def routes() -> list[GuardedRoute]:
    return user_routes(Service(ServeConfig(model="/models/tiny"), Metrics("tiny")))


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


async def test_every_route_of_the_port_is_described_with_its_class(running: Running) -> None:
    document = (await running.http.get("/openapi.json")).json()
    OpenAPIV31SpecValidator(document).validate()
    described = operations(document)
    expected = {
        f"{method} {re.sub(r':path', '', route.path)}": route
        for route in routes()
        for method in route.methods - {"HEAD"}
    }
    assert described.keys() == expected.keys()
    for name, operation in described.items():
        assert operation["summary"], name
        assert bool(operation["security"]) == (expected[name].access is not Access.OPEN)


async def test_every_call_that_takes_json_says_which(running: Running) -> None:
    described = operations((await running.http.get("/openapi.json")).json())
    silent = {
        name
        for name, operation in described.items()
        if name.startswith("POST") and "requestBody" not in operation
    }
    # The others take nothing: their one answer is that they are not supported.
    takes_a_zip = {"POST /rollouts/policy"}
    assert silent == takes_a_zip | {
        f"POST /v2/{area}{{rest}}"
        for area in ("systemsharedmemory", "cudasharedmemory", "trace", "logging")
    }


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
INFER = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]}]}
BODIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "a chat": ("/v1/chat/completions", CHAT, True),
    "a chat with an unknown field": ("/v1/chat/completions", {**CHAT, "no": 1}, False),
    "too many answers": ("/v1/chat/completions", {**CHAT, "n": 100_000}, False),
    "a completion of tokens": ("/v1/completions", {"model": "tiny", "prompt": [2, 3]}, True),
    "a negative token": ("/v1/completions", {"model": "tiny", "prompt": [-2]}, False),
    "a text to split": ("/tokenize", {"prompt": "x"}, True),
    "an inference": ("/v2/models/{model}/infer", INFER, True),
    "an input without a name": ("/v2/models/{model}/infer", {"inputs": [{}]}, False),
}


@pytest.mark.parametrize(("path", "body", "is_taken"), BODIES.values(), ids=BODIES)
async def test_the_schema_of_a_body_agrees_with_the_server(
    running: Running, path: str, body: dict[str, Any], is_taken: bool
) -> None:
    document = (await running.http.get("/openapi.json")).json()
    content = document["paths"][path]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"] | {"components": document["components"]}
    valid = jsonschema.Draft202012Validator(schema).is_valid(body)
    answer = await running.http.post(path.format(model="tiny"), json=body)
    assert (valid, answer.status_code) == (is_taken, 200 if is_taken else 400)


async def test_the_gateway_describes_each_of_its_routes_as_the_runtime_takes_them(
    make_house: MakeHouse,
) -> None:
    house = await make_house()
    async with house.client.get(house.url + "/openapi.json") as answer:
        document = await answer.json()
    OpenAPIV31SpecValidator(document).validate()
    assert document == generated.gateway_description()
    assert house.gateway._api is not None
    served = {
        f"{route.method} {re.sub(r':[^}]*', '', route.resource.canonical)}"
        for route in house.gateway._api.app.router.routes()
        if route.method != "HEAD"
    }
    assert operations(document).keys() == served


async def test_the_gateway_s_description_needs_a_key_like_all_else(
    make_house: MakeHouse, tmp_path: Any
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("")
    house = await make_house(auth="on", keys_file=keys)
    async with house.client.get(house.url + "/openapi.json") as answer:
        assert answer.status == 401
        assert "API key" in json.loads(await answer.read())["error"]["message"]
