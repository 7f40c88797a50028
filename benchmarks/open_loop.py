"""Requests that come however long the others take, and which of them met their objective."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import aiohttp

from benchmarks.load_generator import BrokenStreamError, Client, Stream
from benchmarks.prompts import Prompts
from benchmarks.rows import Row, percentile
from benchmarks.stream_counter import CUT, REFUSED, WHOLE

LONGEST_S = 120.0  # of an answer, after which it is given up


@dataclass(frozen=True, slots=True)
class Stretch:
    """A time in which requests come at one rate."""

    seconds: float
    requests_per_s: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what `SECONDS:RATE` says.

        Raises:
            ValueError: it does not look like that.
        """
        seconds, rate = map(float, text.split(":"))
        if seconds <= 0 or rate < 0:
            raise ValueError(f"{text}: the seconds must be above 0, the rate not below.")
        return cls(seconds, rate)


def draw_arrivals(stretches: Sequence[Stretch], *, seed: int) -> list[float]:
    """Return the seconds at which requests come, each independent of all others.

    Raises:
        ValueError: none comes.
    """
    chance = random.Random(seed)
    arrivals: list[float] = []
    begin_s = 0.0
    for stretch in stretches:
        end_s = begin_s + stretch.seconds
        at_s = begin_s
        while stretch.requests_per_s:
            at_s += chance.expovariate(stretch.requests_per_s)
            if at_s >= end_s:
                break
            arrivals.append(at_s)
        begin_s = end_s
    if not arrivals:
        raise ValueError("No request comes: make a stretch longer or its rate higher.")
    return arrivals


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request is promised: seconds to its first token, and on average between two."""

    ttft_s: float
    itl_s: float

    def times(self, factor: float) -> Limits:
        """Return looser or stricter ones."""
        return Limits(self.ttft_s * factor, self.itl_s * factor)


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request fared; seconds are None where it was refused or cut."""

    end: str  # WHOLE, REFUSED or CUT
    ttft_s: float | None = None
    itl_s: float | None = None  # mean, over tokens: an event may hold several

    @classmethod
    def of(cls, stream: Stream) -> Self:
        """Return what a whole stream came to."""
        lasted_s = stream.event_at[-1] - stream.event_at[0]
        return cls(WHOLE, stream.ttft_s, lasted_s / max(1, stream.output_tokens - 1))

    def meets(self, limits: Limits) -> bool:
        """Whether it came whole and in time."""
        if self.ttft_s is None or self.itl_s is None:
            return False
        return self.ttft_s <= limits.ttft_s and self.itl_s <= limits.itl_s


def attained_pct(answers: Sequence[Answer], limits: Limits) -> float:
    """Return how many of a hundred requests met the limits."""
    return 100 * sum(answer.meets(limits) for answer in answers) / len(answers)


def in_figures(answers: Sequence[Answer]) -> Row:
    """Return how many there were, how they ended, and what those that came whole took."""
    ttft_ms = [1e3 * a.ttft_s for a in answers if a.ttft_s is not None]
    itl_ms = [1e3 * a.itl_s for a in answers if a.itl_s is not None]
    return {
        "requests": len(answers),
        **{end: sum(answer.end == end for answer in answers) for end in (REFUSED, CUT)},
        "ttft_p50_ms": round(percentile(ttft_ms, 50)) if ttft_ms else None,
        "ttft_p95_ms": round(percentile(ttft_ms, 95)) if ttft_ms else None,
        "itl_p95_ms": round(percentile(itl_ms, 95), 1) if itl_ms else None,
    }


async def ask(
    client: Client,
    prompt: list[int],
    output_tokens: int,
    say: Callable[[str], None] = lambda _: None,
) -> Answer:
    """Send one request and read its answer; what went wrong is said and part of the answer."""
    events = 0

    def count(come: int) -> None:
        nonlocal events
        events = come

    try:
        async with asyncio.timeout(LONGEST_S):
            return Answer.of(await client.complete(prompt, output_tokens, count))
    except (BrokenStreamError, aiohttp.ClientError, TimeoutError) as error:
        end = CUT if events else REFUSED
        say(f"a request was {end}: {error!r}")
        return Answer(end)


async def play(
    client: Client,
    arrivals: Sequence[float],
    prompts: Prompts,
    *,
    output_tokens: int,
    say: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """Send every prompt at its time, wait for all answers, and return them in that order."""
    begun = time.monotonic()
    tasks: list[asyncio.Task[Answer]] = []
    async with asyncio.TaskGroup() as group:
        for at_s, prompt in zip(arrivals, prompts, strict=True):
            await asyncio.sleep(max(0.0, begun + at_s - time.monotonic()))
            tasks.append(group.create_task(ask(client, prompt, output_tokens, say)))
    return [task.result() for task in tasks]
