"""What a request pays for a loan: its time to the first token at a replica that trains meanwhile.

    python -m benchmarks.loan_latency MODEL_DIR [--requests 40] [--rounds 3] [--prompt-tokens 64]

One `mizzen serve` is asked now and then, one request at a time. In turns no job is there and a LoRA
job has the weights (`PUT /loan`), which goes on between the requests. Ratios are over all rounds;
`steps` are the job's.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from benchmarks.load_generator import Client, open_session
from benchmarks.prompts import random_prompts
from benchmarks.rows import Rows, percentile
from benchmarks.servers import MODEL_NAME, Server, serving, start_mizzen, vocab_size

_OUTPUT_TOKENS = 4
_WORDS = ("replica", "serves", "lends", "weights", "to", "a", "job", "while", "nobody", "asks")


def write_job(folder: Path, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a job that goes on for as long as it may, with its data beside it."""
    words = random.Random(0)
    data = folder / "data.jsonl"
    with data.open("w") as lines:
        for number in range(200):
            answer = " ".join(words.choices(_WORDS, k=arguments.sample_words))
            turns = [
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": answer},
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return {
        "job": "benchmark/loan",
        "adaptation": {"type": "lora", "rank": 16, "alpha": 32.0},
        "base_model": str(model),
        "datasets": [{"name": "words", "path": str(data)}],
        "processing": {"max_seq_len": 512, "holdout_ratio": 0.1},
        "hyperparameters": {"max_steps": 1_000_000, "batch_size": 2, "micro_batch": 2},
        "checkpoint": {"directory": str(folder / "checkpoints"), "every_seconds": 30},
        "output": {"directory": str(folder / "output"), "kind": "adapter"},
    }


class Lender:
    """The loan's calls of one server."""

    def __init__(self, session: aiohttp.ClientSession, server: Server) -> None:
        self._session = session
        self._url = f"{server.admin_url}/loan"

    async def look(self) -> dict[str, Any]:
        """Return how far the job is."""
        async with self._session.get(self._url) as answer:
            answer.raise_for_status()
            return dict((await answer.json())["loan"])

    async def begin(self, job: dict[str, Any]) -> None:
        """Lend the weights; return once a step was made."""
        async with self._session.put(self._url, json=job) as answer:
            assert answer.status == 202, await answer.text()
        while not (state := await self.look())["progress"]["step"]:
            assert state["exitCode"] is None, state
            await asyncio.sleep(0.2)

    async def end(self) -> int:
        """Take the weights back; return how many steps the job has made by then."""
        async with self._session.delete(self._url) as answer:
            answer.raise_for_status()
        while (state := await self.look())["exitCode"] is None:  # noqa: ASYNC110 - of the server
            await asyncio.sleep(0.1)
        return int(state["progress"]["step"])


async def ask(client: Client, prompts: list[list[int]], pauses: random.Random) -> list[float]:
    """Send prompts one at a time with rests between; return their times to the first token."""
    times = []
    for prompt in prompts:
        await asyncio.sleep(pauses.uniform(0.3, 1.5))
        stream = await client.complete(prompt, _OUTPUT_TOKENS)
        times.append(1e3 * (stream.event_at[0] - stream.sent_at))
    return times


async def measure(server: Server, arguments: argparse.Namespace, folder: Path) -> list[dict]:
    """Ask in turns without a loan and with one."""
    job = write_job(folder, arguments.model, arguments)
    waits: dict[str, list[float]] = {"idle": [], "loan": []}
    steps = 0
    async with open_session() as session:
        client, lender = Client(session, server.url, MODEL_NAME), Lender(session, server)
        for round_ in range(arguments.rounds):
            for number, name in enumerate(waits):
                prompts = random_prompts(
                    arguments.requests,
                    shortest=arguments.prompt_tokens,
                    longest=arguments.prompt_tokens,
                    vocab_size=vocab_size(arguments.model),
                    seed=2 * round_ + number,  # nothing comes from the prefix cache
                )
                if name == "loan":
                    await lender.begin(job | {"generation": round_})
                waits[name] += await ask(client, prompts, random.Random(round_))
                if name == "loan":
                    steps = await lender.end()
    return [row(name, times, waits["idle"], steps) for name, times in waits.items()]


def row(name: str, times: list[float], idle: list[float], steps: int) -> dict[str, Any]:
    """Return the figures of one side, and what they are over those without a loan."""
    return {
        "replica": name,
        "requests": len(times),
        "ttft_p50_ms": round(statistics.median(times), 1),
        "ttft_p95_ms": round(percentile(times, 95), 1),
        "p50_over_idle": round(statistics.median(times) / statistics.median(idle), 2),
        "p95_over_idle": round(percentile(times, 95) / percentile(idle, 95), 2),
        "steps": steps if name == "loan" else None,
    }


def main() -> None:
    """Print a JSON line per side, then a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loan_latency")
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--sample-words", type=int, default=120)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    rows = Rows(f"Time to the first token, {arguments.model.name}, {arguments.threads} threads")
    with TemporaryDirectory() as name:
        folder = Path(name)
        start = partial(
            start_mizzen, arguments.model, f"--adapter-root={folder}", threads=arguments.threads
        )
        with serving(start) as (server,):
            for each in asyncio.run(measure(server, arguments, folder)):
                rows.add(each)
    rows.print_table()


if __name__ == "__main__":
    main()
