"""The gateway before the real runtime, with a random model of two layers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from mizzen.runtime.gateway.directory import Endpoint
from tests.fixtures.gateway_house import CHAT, MODEL, House, open_houses, until
from tests.fixtures.runtime_server import Running, running_tiny_model


async def turn(house: House, messages: list[dict[str, str]]) -> dict[str, Any]:
    body = {"model": "tiny", "messages": messages, "max_tokens": 8, "ignore_eos": True}
    async with house.client.post(house.url + CHAT, json=body) as answer:
        assert answer.status == 200, await answer.text()
        document: dict[str, Any] = await answer.json()
        return document


async def stream(house: House, lines: list[str]) -> None:
    body = {
        **{"model": "tiny", "max_tokens": 8, "ignore_eos": True, "stream": True},
        "messages": [{"role": "user", "content": "held from zero"}],
    }
    async with house.client.post(house.url + CHAT, json=body) as answer:
        assert answer.status == 200
        async for line in answer.content:
            lines += [line.decode().strip()] if line.strip() else []


def in_service(house: House, *runtimes: Running) -> None:
    house.gateway.directory.put_model(MODEL)
    house.gateway.directory.put_slice(
        ("team", "slice"),
        deployment=MODEL.key,
        endpoints=tuple(Endpoint(running.url) for running in runtimes),
    )


async def test_a_held_stream_gets_its_tokens_and_a_conversation_its_cached_prefix(
    tmp_path: Path,
) -> None:
    async with (
        open_houses() as make_house,
        running_tiny_model(tmp_path / "a", served_model_name="tiny") as one,
        running_tiny_model(tmp_path / "b", served_model_name="tiny") as other,
    ):
        house = await make_house(hold_timeout_s=120, progress_s=0.05)
        lines: list[str] = []
        held = asyncio.create_task(stream(house, lines))
        await until(lambda: lines)
        in_service(house, one, other)
        await held
        assert lines[0].startswith(": tiny is starting")
        assert lines[-1] == "data: [DONE]"
        assert sum(1 for line in lines if line.startswith("data: {")) >= 2

        messages = [{"role": "user", "content": "Tell me a long story about a lighthouse. " * 8}]
        first = await turn(house, messages)
        said = first["choices"][0]["message"]["content"]
        messages += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": "Go on."},
        ]
        second = await turn(house, messages)
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
