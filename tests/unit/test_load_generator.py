"""The benchmarks' client counts what a server really sent, and when."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks import inter_token_latency
from benchmarks.load_generator import BrokenStreamError, Client, Stream, closed_loop, open_session
from benchmarks.rows import as_table, median_ratio, percentile


class Scripted:
    """Streams fixed events, or else one per token asked for; counts how many it runs at once."""

    def __init__(self, *events: dict, status: int = 200) -> None:
        self.events, self.status = events, status
        self.running = self.most = 0
        self.prompts: list[list[int]] = []

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.prompts.append(body["prompt"])
        self.running += 1
        self.most = max(self.most, self.running)
        answer = web.StreamResponse(status=self.status)
        await answer.prepare(request)
        count = body["max_tokens"]
        for event in self.events or [*[text("a")] * count, usage(count)]:
            await answer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await answer.write(b"data: [DONE]\n\n")
        self.running -= 1
        return answer


def text(tokens: str) -> dict:
    return {"choices": [{"index": 0, "text": tokens}]}


def usage(count: int) -> dict:
    return {"choices": [], "usage": {"completion_tokens": count}}


@asynccontextmanager
async def asking(scripted: Scripted) -> AsyncIterator[Client]:
    app = web.Application()
    app.router.add_post("/v1/completions", scripted.completions)
    async with TestServer(app) as server, open_session() as session:
        yield Client(session, str(server.make_url("")).rstrip("/"), "model")


async def test_tokens_are_counted_by_usage_and_gaps_by_events() -> None:
    # Three events for four tokens: one waited for the other half of a character.
    async with asking(Scripted(text("a"), text("b"), text("cd"), usage(4))) as client:
        stream = await client.complete([1, 2], 4)
    assert stream.output_tokens == 4
    assert len(stream.event_at) == 3
    assert len(stream.gaps_s) == 2
    assert 0 < stream.ttft_s <= stream.event_at[-1] - stream.sent_at


@pytest.mark.parametrize(
    ("scripted", "said"),
    [
        (Scripted(text("a"), usage(1)), "4 tokens were asked for, 1 came"),
        (Scripted(text("a")), "4 tokens were asked for, 0 came"),
        (Scripted({"error": {"message": "no blocks"}}), "no blocks"),
        (Scripted(usage(4), status=503), "503"),
    ],
    ids=["an early end", "no usage", "an error event", "an error status"],
)
async def test_an_answer_that_is_not_whole_is_no_measurement(scripted: Scripted, said: str) -> None:
    async with asking(scripted) as client:
        with pytest.raises(BrokenStreamError, match=said):
            await client.complete([1], 4)


async def test_a_closed_loop_sends_every_prompt_once_and_never_more_at_once_than_asked() -> None:
    scripted = Scripted(text("a"), text("b"), usage(2))
    prompts = [[number] for number in range(12)]
    async with asking(scripted) as client:
        load = await closed_loop(client, prompts, output_tokens=2, concurrency=3)
    assert sorted(scripted.prompts) == prompts
    assert scripted.most <= 3
    assert load.output_tok_s == pytest.approx(24 / load.wall_s)


async def test_the_long_prompt_is_sent_once_every_stream_is_under_way() -> None:
    scripted = Scripted()
    async with asking(scripted) as client:
        found = await inter_token_latency.disturb(client, [[1], [2], [3] * 50], 8)
    assert scripted.prompts[-1] == [3] * 50
    assert [len(stream.event_at) for stream in found.streams] == [8, 8]
    assert found.late.output_tokens == 1


def test_gaps_belong_to_the_time_before_or_during_the_long_prompt() -> None:
    stream = Stream(0.0, (1.0, 2.0, 4.0, 7.0, 8.0, 9.0), 6)
    late = Stream(2.5, (7.5,), 1)
    quiet, during, every = inter_token_latency.Disturbance((stream,), late).gaps_ms()
    assert (quiet, during, every) == ([1e3], [2e3, 3e3, 1e3], [1e3, 2e3, 3e3, 1e3, 1e3])


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile(range(1, 101), 99) == 99
    assert percentile([5.0], 99) == 5.0
    assert percentile([3, 1, 2], 50) == 2


def test_a_ratio_compares_what_ran_in_the_same_round() -> None:
    assert median_ratio([1, 2, 4], [2, 4, 4]) == 2.0


def test_a_table_leaves_a_missing_column_empty() -> None:
    assert as_table([{"a": 1}, {"a": 22, "b": None}]) == " a  b\n 1\n22"
