"""How much a long prompt disturbs running streams, with chunked prefill and without.

    python -m benchmarks.inter_token_latency MODEL_DIR [--prompt-tokens 4000] [--rounds 3]

Eight clients stream answers from `mizzen serve`; a quarter of the way one more sends a long prompt.
`itl_*` are over all gaps of the eight streams, `during_*` over those between that prompt's arrival
and its first token, `quiet_p50_ms` over those before. `during_over_p50` is what a stream feels of
the prompt: the 99th percentile meanwhile, over the median of all gaps. "chunked" is the server as
it comes, "whole" takes up to the whole context in one step, which is chunked prefill off.
"""

import argparse
import asyncio
import os
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.load_generator import Client, Stream, open_session
from benchmarks.prompts import random_prompts
from benchmarks.rows import Rows, percentile
from benchmarks.servers import MODEL_NAME, Server, serving, start_mizzen, turn, vocab_size


@dataclass(frozen=True, slots=True)
class Disturbance:
    """The running streams, and the one whose long prompt came between."""

    streams: tuple[Stream, ...]
    late: Stream

    def gaps_ms(self) -> tuple[list[float], list[float], list[float]]:
        """Return the gaps that ended before the prompt came, while it was computed, and all."""
        came, done = self.late.sent_at, self.late.event_at[0]
        quiet, during, every = [], [], []
        for stream in self.streams:
            for begin, end in zip(stream.event_at, stream.event_at[1:], strict=False):
                gap_ms = 1e3 * (end - begin)
                every.append(gap_ms)
                if end <= came:
                    quiet.append(gap_ms)
                elif begin < done:
                    during.append(gap_ms)
        return quiet, during, every


async def disturb(client: Client, prompts: list[list[int]], output_tokens: int) -> Disturbance:
    """Stream all prompts but the last; send that one once each stream has a quarter."""
    *short, long = prompts
    waiting_for = set(range(len(short)))
    all_run = asyncio.Event()

    def on_event(count: int, index: int) -> None:
        if count == output_tokens // 4:
            waiting_for.discard(index)
            if not waiting_for:
                all_run.set()

    async with asyncio.TaskGroup() as group:
        streams = [
            group.create_task(
                client.complete(prompt, output_tokens, partial(on_event, index=index))
            )
            for index, prompt in enumerate(short)
        ]
        await all_run.wait()
        late = await client.complete(long, 1)
    return Disturbance(tuple(stream.result() for stream in streams), late)


def run_disturbed(server: Server, prompts: list[list[int]], output_tokens: int) -> Disturbance:
    """Do it from code that is not asynchronous."""

    async def run() -> Disturbance:
        async with open_session() as session:
            client = Client(session, server.url, MODEL_NAME)
            return await disturb(client, prompts, output_tokens)

    return asyncio.run(run())


def row(name: str, disturbances: list[Disturbance]) -> dict:
    """Return the figures over all rounds."""
    parts = [each.gaps_ms() for each in disturbances]
    quiet, during, every = ([gap for part in parts for gap in part[i]] for i in range(3))
    p50, p99 = statistics.median(every), percentile(every, 99)
    during_p99 = percentile(during, 99)
    return {
        "prefill": name,
        "itl_p50_ms": round(p50, 1),
        "itl_p99_ms": round(p99, 1),
        "p99_over_p50": round(p99 / p50, 2),
        "itl_max_ms": round(max(every), 1),
        "quiet_p50_ms": round(statistics.median(quiet), 1),
        "during_p50_ms": round(statistics.median(during), 1),
        "during_p99_ms": round(during_p99, 1),
        "during_over_p50": round(during_p99 / p50, 2),
        "long_ttft_s": round(statistics.median(d.late.ttft_s for d in disturbances), 2),
    }


def main() -> None:
    """Print one JSON line for each way, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    model, long = arguments.model.resolve(), arguments.prompt_tokens
    start = partial(start_mizzen, model, f"--max-model-len={long + 16}", threads=arguments.threads)
    whole = f"--max-num-batched-tokens={long + 1024}"
    seen: dict[str, list[Disturbance]] = {"chunked": [], "whole": []}
    ids = {"vocab_size": vocab_size(model)}
    with serving(partial(start, name="chunked"), partial(start, whole, name="whole")) as servers:
        for round_ in range(arguments.rounds):
            prompts = random_prompts(arguments.streams, shortest=64, longest=64, seed=round_, **ids)
            prompts += random_prompts(1, shortest=long, longest=long, seed=round_, **ids)
            for server in servers:
                with turn(server):
                    found = run_disturbed(server, prompts, arguments.output_tokens)
                seen[server.name].append(found)
    rows = Rows(
        f"{arguments.streams} streams while a prompt of {long} tokens arrives: {model.name}"
    )
    for name, disturbances in seen.items():
        rows.add(row(name, disturbances))
    rows.print_table()


if __name__ == "__main__":
    main()
