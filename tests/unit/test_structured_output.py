"""Answers that follow a grammar, over HTTP from a random model: nothing else would make it."""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

from mizzen.runtime.engine import grammar
from mizzen.runtime.engine.api import Grammar
from mizzen.runtime.server.schemas import OpenAIRequest
from tests.fixtures.runtime_server import Running, eventually, running_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "ü"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running_tiny_model(tmp_path_factory.mktemp("model")) as running:
        yield running


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a grammar may cost is told by its work; how long that takes, by the machine."""
    monkeypatch.setattr(grammar, "COMPILE_LIMIT_S", 300.0)


async def complete(running: Running, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 300, **fields}
    answer = await running.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def wrapped(schema: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


WAYS: dict[str, dict[str, Any]] = {
    "response_format": {"response_format": wrapped(SCHEMA)},
    "structured_outputs": {"structured_outputs": {"json": SCHEMA}},
    "guided_json as text": {"guided_json": json.dumps(SCHEMA)},
    "deaf to the end token": {"guided_json": SCHEMA, "ignore_eos": True},
    "greedy": {"guided_json": SCHEMA, "temperature": 0},
}


@pytest.mark.parametrize("fields", WAYS.values(), ids=WAYS)
async def test_an_answer_fits_its_schema(running: Running, fields: dict[str, Any]) -> None:
    choice = await complete(running, **fields)
    jsonschema.validate(json.loads(choice["text"]), SCHEMA)
    assert choice["finish_reason"] == "stop"


async def test_each_row_of_a_batch_has_its_own_grammar_or_none(running: Running) -> None:
    free = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
    alone = await complete(running, **free)
    together = await asyncio.gather(
        complete(running, guided_regex=r"[a-c]{3}-[0-9]{1,5}/[0-9]{2}"),
        complete(running, **free),
        complete(running, guided_choice=['say "yes"', "no", "ü"]),
        complete(running, structured_outputs={"json": SCHEMA}),
        complete(running, structured_outputs={"grammar": 'start: "a" (" b")~3'}),
    )
    texts = [choice["text"] for choice in together]
    assert re.fullmatch(r"[a-c]{3}-[0-9]{1,5}/[0-9]{2}", texts[0])
    assert texts[1] == alone["text"]
    assert texts[2] in ('say "yes"', "no", "ü")
    jsonschema.validate(json.loads(texts[3]), SCHEMA)
    assert texts[4] == "a b b b"


async def test_json_mode_begins_an_object(running: Running) -> None:
    for seed in range(3):
        choice = await complete(running, seed=seed, response_format={"type": "json_object"})
        assert choice["text"].lstrip().startswith("{")
        if choice["finish_reason"] == "stop":
            json.loads(choice["text"])


async def test_a_grammar_survives_preemption(tmp_path: Path) -> None:
    # Four answers of 17 blocks each do not fit the 48 there are.
    async with running_tiny_model(tmp_path, max_model_len=400, kv_cache_gib=0.0004) as running:
        texts = await asyncio.gather(
            *(complete(running, guided_regex=r"[a-c]{250}", seed=i) for i in range(4))
        )
        assert all(re.fullmatch(r"[a-c]{250}", choice["text"]) for choice in texts)
        assert running.service.engine.stats().preemptions > 0


DEEP = '{"a":' * 10_000 + "1" + "}" * 10_000
HOSTILE: dict[str, str] = {
    "a schema 10,000 deep": f'{{"guided_json": {DEEP}}}',
    "the same as text": json.dumps({"guided_json": DEEP}),
    "a million repetitions": json.dumps({"guided_regex": "a{1000000}"}),
    # The tail keeps a random model from ending its text before the repetitions cost too much.
    "nested repetitions": json.dumps(
        {"guided_regex": "((((.{0,50}){0,50}){0,50}){0,50}){0,50}x{50}", "max_tokens": 300}
    ),
    "a broken expression": json.dumps({"guided_regex": "("}),
    "an unknown type": json.dumps({"response_format": wrapped({"type": "strange"})}),
    "nothing satisfies it": json.dumps({"guided_json": {"$ref": "#"}}),
    "broken rules": json.dumps({"guided_grammar": "start: nowhere"}),
    "over the size": json.dumps({"guided_choice": ["x" * 300_000]}),
    "two at once": json.dumps({"guided_regex": "a", "guided_json": {}}),
    "none": json.dumps({"structured_outputs": {}}),
    "no schema": json.dumps({"response_format": {"type": "json_schema"}}),
    "no end wanted": json.dumps({"guided_regex": "a", "min_tokens": 5}),
    "100,000 answers": '{"n": 100000}',
    "10,000 stop strings": json.dumps({"stop": ["x"] * 10_000}),
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
async def test_what_cannot_be_honoured_is_a_400_and_costs_nobody_else(
    running: Running, fields: str
) -> None:
    body = '{"model": "tiny", "prompt": "x", ' + fields[1:]
    answer = await running.http.post("/v1/completions", content=body)
    assert answer.status_code == 400, answer.text
    assert running.service.engine.in_flight() == 0
    assert (await complete(running, max_tokens=1))["finish_reason"] == "length"


async def test_who_only_waited_for_the_grammars_of_others_may_come_again(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "COMPILE_LIMIT_S", 0.05)
    go_on = threading.Event()
    running.service.engine._grammars._threads.submit(go_on.wait)
    body = {"model": "tiny", "prompt": "x", "guided_regex": "c+"}
    try:
        answer = await running.http.post("/v1/completions", json=body)
    finally:
        go_on.set()
    assert answer.status_code == 429
    assert "Retry-After" in answer.headers
    assert "of other requests are being compiled" in answer.json()["error"]["message"]
    assert running.service.engine.in_flight() == 0


async def test_large_grammars_are_not_all_remembered(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MAX_KEPT_CHARS", 250)
    compiler = running.service.engine._grammars
    for letter in "abcb":
        await compiler.start(Grammar("regex", letter * 100))
    assert [kept.source[0] for kept in compiler._kept] == ["c", "b"]


async def test_a_client_that_leaves_while_its_grammar_compiles_leaves_nothing(
    running: Running,
) -> None:
    compiler = running.service.engine._grammars
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        go_on.wait()

    compiler._threads.submit(hold)
    await asyncio.to_thread(begun.wait)
    call = asyncio.create_task(complete(running, guided_regex="b+"))
    await eventually(lambda: running.service.in_flight() == 1)
    call.cancel()
    await eventually(lambda: running.service.in_flight() == 0)
    go_on.set()
    assert running.service.engine.stats().blocks_free == running.service.engine.stats().blocks_total


async def test_old_and_new_names_mean_the_same() -> None:
    old = OpenAIRequest(model="m", guided_regex="a+")
    new = OpenAIRequest(model="m", structured_outputs={"regex": "a+"})
    # As libraries write out what is not set.
    full = OpenAIRequest(model="m", structured_outputs={"regex": "a+", "json": None})
    assert old.grammar() == new.grammar() == full.grammar() == Grammar("regex", "a+")
