"""What a client of a server sees: output tokens per second, time to first token, gaps.

    python -m benchmarks.load_generator URL MODEL [--concurrency 8] [--requests 32]

Speaks OpenAI's streaming /v1/completions with token ids as prompts, so it measures any server
that does. Closed loop: so many requests are always under way, until all are done. Tokens are
counted as the server's `usage` does: an event may carry several, or wait for half a character.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp

from benchmarks.prompts import Prompts, random_prompts
from benchmarks.rows import Row, Rows, percentile


class BrokenStreamError(RuntimeError):
    """A server answered with an error, or ended a stream early."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer: when it was asked for, when its events came, and how many tokens they held."""

    sent_at: float
    event_at: tuple[float, ...]
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Seconds to the first event."""
        return self.event_at[0] - self.sent_at

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one event and the next."""
        return [b - a for a, b in zip(self.event_at, self.event_at[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Client:
    """Asks one server for greedy answers of a fixed length."""

    session: aiohttp.ClientSession
    url: str
    model: str

    async def complete(
        self,
        prompt: list[int],
        output_tokens: int,
        on_event: Callable[[int], None] = lambda _: None,
    ) -> Stream:
        """Stream one answer; `on_event` learns how many events have come.

        Raises:
            BrokenStreamError: the answer is an error, or shorter than asked for.
        """
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        event_at: list[float] = []
        counted = 0
        sent_at = time.perf_counter()
        async with self.session.post(f"{self.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise BrokenStreamError(f"{answer.status}: {(await answer.text())[:500]}")
            async for event in _events(answer.content):
                if event.get("choices"):
                    event_at.append(time.perf_counter())
                    on_event(len(event_at))
                if usage := event.get("usage"):
                    counted = usage["completion_tokens"]
        if counted != output_tokens or not event_at:
            raise BrokenStreamError(f"{output_tokens} tokens were asked for, {counted} came")
        return Stream(sent_at, tuple(event_at), counted)


async def _events(lines: AsyncIterator[bytes]) -> AsyncIterator[dict]:
    async for line in lines:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise BrokenStreamError(str(event["error"]))
            yield event


def open_session(api_key: str = "") -> aiohttp.ClientSession:
    """Return a session that lets as many requests run as are asked for, for as long as it takes."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
    )


@dataclass(frozen=True, slots=True)
class Load:
    """All answers of one run."""

    wall_s: float
    streams: tuple[Stream, ...]

    @property
    def output_tok_s(self) -> float:
        """Output tokens per second, over all streams."""
        return sum(stream.output_tokens for stream in self.streams) / self.wall_s

    def row(self) -> Row:
        """Return what a table shows of it."""
        gaps_ms = [1e3 * gap for stream in self.streams for gap in stream.gaps_s]
        ttft_ms = [1e3 * stream.ttft_s for stream in self.streams]
        return {
            "tok_s": round(self.output_tok_s, 1),
            "ttft_p50_ms": round(statistics.median(ttft_ms), 1),
            "ttft_p99_ms": round(percentile(ttft_ms, 99), 1),
            "itl_p50_ms": round(statistics.median(gaps_ms), 2),
            "itl_p99_ms": round(percentile(gaps_ms, 99), 2),
        }


async def closed_loop(
    client: Client, prompts: Prompts, *, output_tokens: int, concurrency: int
) -> Load:
    """Send every prompt, `concurrency` at a time."""
    waiting = iter(prompts)
    streams: list[Stream] = []

    async def one_after_the_other() -> None:
        for prompt in waiting:  # shared: whoever is free takes the next
            stream = await client.complete(prompt, output_tokens)
            streams.append(stream)

    began_at = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(one_after_the_other())
    return Load(time.perf_counter() - began_at, tuple(streams))


def run_load(url: str, model: str, prompts: Prompts, *, output_tokens: int, at_once: int) -> Load:
    """Do a closed loop from code that is not asynchronous."""

    async def run() -> Load:
        async with open_session() as session:
            client = Client(session, url, model)
            return await closed_loop(
                client, prompts, output_tokens=output_tokens, concurrency=at_once
            )

    return asyncio.run(run())


def main() -> None:
    """Print one JSON line per concurrency, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("model", help="as the server calls it")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input-tokens", type=int, nargs=2, default=[64, 192])
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=32000)
    arguments = parser.parse_args()
    rows = Rows(f"{arguments.model} at {arguments.url}")
    for seed, count in enumerate(arguments.concurrency):
        prompts = random_prompts(
            arguments.requests,
            shortest=arguments.input_tokens[0],
            longest=arguments.input_tokens[1],
            vocab_size=arguments.vocab_size,
            seed=seed,
        )
        load = run_load(
            arguments.url,
            arguments.model,
            prompts,
            output_tokens=arguments.output_tokens,
            at_once=count,
        )
        rows.add({"concurrency": count, **load.row()})
    rows.print_table()


if __name__ == "__main__":
    main()
