"""Requests that come at random, and the verdict on each."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.load_generator import Client, Stream, open_session
from benchmarks.open_loop import (
    Answer,
    Limits,
    Stretch,
    ask,
    attained_pct,
    draw_arrivals,
    in_figures,
    play,
)
from benchmarks.stream_counter import CUT, REFUSED, WHOLE

LIMITS = Limits(ttft_s=1.0, itl_s=0.1)
Json = dict[str, Any]


def test_each_stretch_has_its_rate_and_a_seed_its_arrivals() -> None:
    stretches = [Stretch(1000, 0.5), Stretch(500, 0), Stretch(1000, 2)]
    arrivals = draw_arrivals(stretches, seed=1)
    assert arrivals == sorted(arrivals) == draw_arrivals(stretches, seed=1)
    assert arrivals != draw_arrivals(stretches, seed=2)
    counts = [
        sum(begin <= at < end for at in arrivals)
        for begin, end in ((0, 1000), (1000, 1500), (1500, 2500))
    ]
    assert counts[0] == pytest.approx(500, rel=0.2)
    assert counts[1] == 0
    assert counts[2] == pytest.approx(2000, rel=0.2)


def test_stretches_without_a_request_are_refused() -> None:
    with pytest.raises(ValueError, match="make a stretch longer or its rate higher"):
        draw_arrivals([Stretch(60, 0)], seed=1)


def test_a_stretch_is_written_as_seconds_and_rate() -> None:
    assert Stretch.parse("90:2.5") == Stretch(90, 2.5)


@pytest.mark.parametrize("text", ["90", "0:1", "90:-1", "a:b"])
def test_what_is_no_stretch_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Stretch.parse(text)


VERDICTS = {
    "within both limits it meets them": (Answer(WHOLE, 1.0, 0.1), True),
    "a late first token misses": (Answer(WHOLE, 1.1, 0.05), False),
    "slow tokens miss": (Answer(WHOLE, 0.5, 0.11), False),
    "a refused one misses": (Answer(REFUSED), False),
    "a cut one misses": (Answer(CUT), False),
}


@pytest.mark.parametrize(("answer", "is_met"), VERDICTS.values(), ids=VERDICTS)
def test_the_verdict_on_a_request(answer: Answer, is_met: bool) -> None:
    assert answer.meets(LIMITS) is is_met


def test_attainment_counts_all_requests_and_follows_the_limits() -> None:
    answers = [answer for answer, _ in VERDICTS.values()]
    assert attained_pct(answers, LIMITS) == 20
    assert attained_pct(answers, LIMITS.times(2)) == 60
    assert attained_pct(answers, LIMITS.times(0.5)) == 0


def test_figures_are_of_the_requests_that_came_whole() -> None:
    figures = in_figures([answer for answer, _ in VERDICTS.values()])
    assert figures == {
        **{"requests": 5, "refused": 1, "cut": 1},
        **{"ttft_p50_ms": 1000, "ttft_p95_ms": 1100, "itl_p95_ms": 110.0},
    }
    assert in_figures([Answer(REFUSED)])["ttft_p95_ms"] is None


def test_the_time_between_tokens_is_over_tokens_since_an_event_may_hold_several() -> None:
    stream = Stream(sent_at=1.0, event_at=(1.5, 2.0, 3.5), output_tokens=5)
    assert Answer.of(stream) == Answer(WHOLE, 0.5, 0.5)


@asynccontextmanager
async def asking(*events: Json, status: int = 200) -> AsyncIterator[tuple[Client, list[str]]]:
    """Yield a client of a server that always answers so, and the keys it was shown."""
    keys: list[str] = []

    async def complete(request: web.Request) -> web.StreamResponse:
        keys.append(request.headers.get("Authorization", ""))
        answer = web.StreamResponse(status=status)
        await answer.prepare(request)
        for event in events:
            await answer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        return answer

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    async with TestServer(app) as server, open_session("mz-1") as session:
        yield Client(session, str(server.make_url("")).rstrip("/"), "model"), keys


TEXT = {"choices": [{"index": 0, "text": "a"}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 2}}
ENDS: dict[str, tuple[list[Json], int, str]] = {
    "one with all its tokens is whole": ([TEXT, TEXT, USAGE], 200, WHOLE),
    "one with an error status is refused": ([], 503, REFUSED),
    "an error before the first token refuses": ([{"error": "full"}], 200, REFUSED),
    "one that ends early is cut": ([TEXT], 200, CUT),
}


@pytest.mark.parametrize(("events", "status", "end"), ENDS.values(), ids=ENDS)
async def test_how_a_request_ends(events: list[Json], status: int, end: str) -> None:
    said: list[str] = []
    async with asking(*events, status=status) as (client, keys):
        answer = await ask(client, [1], 2, said.append)
    assert answer.end == end
    assert [end in line for line in said] == ([] if end == WHOLE else [True])
    assert keys == ["Bearer mz-1"]


async def test_every_prompt_is_sent_and_answered_in_its_place() -> None:
    async with asking(TEXT, TEXT, USAGE) as (client, keys):
        answers = await play(client, [0.0, 0.0, 0.01], [[1], [2], [3]], output_tokens=2)
    assert [answer.end for answer in answers] == [WHOLE] * 3
    assert len(keys) == 3
