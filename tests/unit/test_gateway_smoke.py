"""What `helm test` says when there is nothing to ask, and when the answer is good, late or bad."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from mizzen.runtime.gateway import smoke
from mizzen.runtime.gateway.smoke import SmokeConfig, SmokeError

GOOD = {
    "choices": [{"message": {"role": "assistant", "content": "Hello!"}}],
    "usage": {"completion_tokens": 3},
}


class Door:
    """A gateway that gives scripted answers; the last one again and again."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any]] = [(200, GOOD)]
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.asked.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        status, document = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.json_response(document, status=status)


@pytest.fixture
async def door(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Door]:
    monkeypatch.setattr(smoke, "_PAUSE_S", 0.01)
    one = Door()
    runner = web.ServerRunner(web.Server(one.answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    one.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield one
    await runner.cleanup()


def _config(door: Door, **settings: Any) -> SmokeConfig:
    return SmokeConfig(gateway_url=door.url, served_model="quickstart/tiny", **settings)


async def test_tokens_are_a_pass(door: Door) -> None:
    assert "'Hello!' after" in await smoke.run(_config(door))
    assert door.asked[0]["model"] == "quickstart/tiny"
    assert door.keys == [None]


async def test_it_waits_for_its_key_its_model_and_its_replica(door: Door) -> None:
    door.answers = [(401, {}), (404, {}), (503, {}), (200, GOOD)]
    await smoke.run(_config(door))
    assert len(door.asked) == 4


BAD: dict[str, tuple[int, Any, str]] = {
    "a refusal": (400, {"error": {"message": "no"}}, "The gateway answered 400"),
    "no tokens": (200, {**GOOD, "usage": {"completion_tokens": 0}}, "without tokens"),
    "no text": (
        200,
        {"choices": [{"message": {"content": ""}}], "usage": {"completion_tokens": 1}},
        "without tokens",
    ),
    "never ready": (503, {}, "No answer within 0.3 seconds"),
}


@pytest.mark.parametrize(("status", "document", "says"), BAD.values(), ids=BAD)
async def test_it_fails_with_what_it_saw(door: Door, status: int, document: Any, says: str) -> None:
    door.answers = [(status, document)]
    with pytest.raises(SmokeError, match=says):
        await smoke.run(_config(door, timeout_s=0.3 if status == 503 else 300))


def test_with_nothing_to_ask_it_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIZZEN_SMOKE_GATEWAY_URL", "http://nowhere")
    assert smoke.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("SKIPPED")
    assert "test.servedModel" in said
    assert "test.model" in said
