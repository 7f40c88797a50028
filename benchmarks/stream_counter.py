"""A client that counts how streams end: whole, refused before their first word, or cut.

A few clients stream side by side, each again and again. A stream is whole when it came with every
token it was asked for and with its end mark; what began and did not end so was cut.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

WHOLE, REFUSED, CUT = "whole", "refused", "cut"


@dataclass(slots=True)
class StreamCounter:
    """Streams of one model through one address, and how they ended."""

    url: str
    model: str
    max_tokens: int = 64
    api_key: str = ""
    pause_s: float = 0.0  # of a client between two streams
    begun: int = 0  # that brought a first token
    ends: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)  # of the first few that were not whole

    @asynccontextmanager
    async def load(self, streams: int) -> AsyncIterator[None]:
        """Keep so many streams open inside the block; those open at its end are let finish."""
        stop = asyncio.Event()
        timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            asyncio.TaskGroup() as group,
        ):
            for number in range(streams):
                group.create_task(self._keep_asking(session, stop, number))
            try:
                yield
            finally:
                stop.set()

    async def _keep_asking(
        self, session: aiohttp.ClientSession, stop: asyncio.Event, number: int
    ) -> None:
        asked = 0
        while not stop.is_set():
            asked += 1
            end, why = await self._ask(session, f"Story {asked} of teller {number}.")
            self.ends[end] += 1
            if end is not WHOLE and len(self.errors) < 20:
                self.errors.append(f"{end}: {why}")
            await asyncio.sleep(max(self.pause_s, 0.2) if end is REFUSED else self.pause_s)

    async def _ask(self, session: aiohttp.ClientSession, prompt: str) -> tuple[str, str]:
        """Read one stream to its end; return how it ended, and why not well."""
        body = {
            **{"model": self.model, "max_tokens": self.max_tokens, "ignore_eos": True},
            **{"stream": True, "stream_options": {"include_usage": True}},
            "messages": [{"role": "user", "content": prompt}],
        }
        has_begun, tokens, last = False, 0, ""
        try:
            async with session.post(f"{self.url}/v1/chat/completions", json=body) as answer:
                if answer.status != 200:
                    return REFUSED, f"{answer.status} {(await answer.text())[:200]}"
                async for line in answer.content:
                    if not line.startswith(b"data: "):
                        continue  # a comment while it is held, or an event's end
                    last = line[6:].decode().strip()
                    if last != "[DONE]":
                        event = json.loads(last)
                        if event.get("choices") and not has_begun:
                            has_begun, self.begun = True, self.begun + 1
                        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return (CUT if has_begun else REFUSED), repr(error)
        if last == "[DONE]" and tokens == self.max_tokens:
            return WHOLE, ""
        return (CUT if has_begun else REFUSED), f"{tokens} tokens, then {last[:200]}"
