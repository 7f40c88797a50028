"""The simulator beside the engine it stands for: the same requests at the same moments.

    python -m benchmarks.calibration MODEL [--shares 0.3 0.5 0.7] [--seconds 60]

Before and after each run the three costs of a step are measured on the server, which is then idle
otherwise: one for the step, one for each running sequence (from inter-token times at several
concurrencies, after prompts and answers as long as the run's: attention makes a longer context cost
more) and one for each prompt token (from times to the first token of prompts of several lengths).
In the run requests arrive at random, at a share of the rate at which steps would take for ever, and
a simulated replica of the mean of both profiles is given the very same. The aim: below the knee,
mean ITL and p95 TTFT agree within 15 %. About twelve minutes with SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from benchmarks.load_generator import Client, Stream, open_session, run_load
from benchmarks.prompts import random_prompts
from benchmarks.rows import Row, Rows, percentile
from benchmarks.servers import MODEL_NAME, Server, read_once, serving, start_mizzen, vocab_size
from mizzen.operator.simulator.experiment import run_policy
from mizzen.operator.simulator.replica_profile import Profile
from mizzen.operator.simulator.simulation import Setting
from mizzen.operator.simulator.traces import Request

# One budget for every step, as the simulated engine has; left out, ours has two on a CPU.
STEP_TOKENS = 256
CONCURRENCIES = (1, 2, 4, 8, 16)
# The run's prompts: attention makes a token of a longer one cost more.
PROMPT_LENGTHS = (64, 128, 192, 256)
PROMPT_RANGE = (PROMPT_LENGTHS[0], PROMPT_LENGTHS[-1])
MEAN_PROMPT = sum(PROMPT_RANGE) // 2
ANSWER_TOKENS = 64
MODEL_LEN = 1024
REPEATS = 4


class NoisyMachineError(RuntimeError):
    """More work took no more time, so something else decided how long a step took."""


def mean_itl_s(stream: Stream) -> float:
    """Return the seconds between two tokens of one answer."""
    return (stream.event_at[-1] - stream.event_at[0]) / (stream.output_tokens - 1)


def together_s(streams: Sequence[Stream]) -> float:
    """Return the mean seconds between tokens while all of these answers were being written.

    Raises:
        NoisyMachineError: one was complete before another began.
    """
    began, ended = (max(s.event_at[0] for s in streams), min(s.event_at[-1] for s in streams))
    gaps = [
        later - earlier
        for stream in streams
        for earlier, later in pairwise(stream.event_at)
        if began <= earlier and later <= ended
    ]
    if not gaps:
        raise NoisyMachineError(
            "Answers asked for at once were written one after another. Run it again while the "
            "machine does nothing else."
        )
    return statistics.fmean(gaps)


def ask(
    server: Server, lengths: Sequence[int], *, words: int, output_tokens: int
) -> Sequence[Stream]:
    """Return the answers to prompts of these lengths, asked at once and never before."""
    prompts = [
        random_prompts(1, shortest=n, longest=n, vocab_size=words, seed=time.monotonic_ns())[0]
        for n in lengths
    ]
    return run_load(
        server.url, MODEL_NAME, prompts, output_tokens=output_tokens, at_once=len(prompts)
    ).streams


def measure_profile(server: Server, *, words: int) -> Profile:
    """Return what a step of this server costs."""
    running: dict[int, list[float]] = {count: [] for count in CONCURRENCIES}
    prompted: dict[int, list[Stream]] = {length: [] for length in PROMPT_LENGTHS}
    # In turns, so that a minute in which the machine was slow counts for all of them.
    for _ in range(REPEATS):
        for count in CONCURRENCIES:
            prompts = [MEAN_PROMPT] * count
            answers = ask(server, prompts, words=words, output_tokens=ANSWER_TOKENS)
            running[count].append(together_s(answers))
        for length in PROMPT_LENGTHS:
            prompted[length] += ask(server, [length], words=words, output_tokens=1)
    itls = [statistics.median(times) for times in running.values()]
    per_sequence, per_step = statistics.linear_regression(CONCURRENCIES, itls)
    ttfts = [statistics.median(answer.ttft_s for answer in ones) for ones in prompted.values()]
    steps = [-(-n // STEP_TOKENS) for n in PROMPT_LENGTHS]
    computed = [ttft - per_step * count for ttft, count in zip(ttfts, steps, strict=True)]
    per_token, _ = statistics.linear_regression(PROMPT_LENGTHS, computed)
    return Profile(
        step_s=max(per_step, 1e-6),
        step_per_sequence_s=max(per_sequence, 0.0),  # of noise; full_rate() refuses it
        step_per_prompt_token_s=max(per_token, 0.0),
        budget_tokens=STEP_TOKENS,
        max_sequences=64,
        gpus=1,
    )


def between(before: Profile, after: Profile) -> Profile:
    """Return the mean costs: a shared machine is not as fast in every minute."""

    def mean(cost: str) -> float:
        return statistics.fmean((getattr(before, cost), getattr(after, cost)))

    costs = ("step_s", "step_per_sequence_s", "step_per_prompt_token_s")
    return replace(before, **{cost: mean(cost) for cost in costs})


def full_rate(profile: Profile) -> float:
    """Return the requests per second at which steps would take for ever.

    Raises:
        NoisyMachineError: a sequence or a prompt's token was measured to cost nothing.
    """
    cost_s = (
        profile.step_per_sequence_s * ANSWER_TOKENS + profile.step_per_prompt_token_s * MEAN_PROMPT
    )
    if min(profile.step_per_sequence_s, profile.step_per_prompt_token_s) <= 0:
        raise NoisyMachineError(
            "More sequences, or longer prompts, took no more time. Run it again while the machine "
            "does nothing else."
        )
    return 1 / cost_s


def draw_requests(per_s: float, seconds: float, *, seed: int) -> list[Request]:
    """Return requests that arrive at random, at least two."""
    chance, at, drawn = random.Random(seed), 0.0, []
    while at < seconds or len(drawn) < 2:
        drawn.append(Request(at, chance.randint(*PROMPT_RANGE), ANSWER_TOKENS))
        at += chance.expovariate(per_s)
    return drawn


async def replay(server: Server, requests: Sequence[Request], *, words: int) -> list[Stream]:
    """Send each request at its moment; return the answers."""
    chance = random.Random(len(requests))
    async with open_session() as session:
        client, began_at = Client(session, server.url, MODEL_NAME), time.perf_counter()

        async def send(request: Request) -> Stream:
            prompt = [chance.randrange(words) for _ in range(request.prompt_tokens)]
            await asyncio.sleep(began_at + request.arrival_s - time.perf_counter())
            return await client.complete(prompt, request.output_tokens)

        return list(await asyncio.gather(*map(send, requests)))


def compare(streams: Sequence[Stream], requests: Sequence[Request], profile: Profile) -> Row:
    """Return the figures of the engine, those of the simulator and their ratios."""
    setting = Setting(profile=profile, initial_replicas=1, max_replicas=1)
    flights = run_policy("static", requests, setting, target=1)[0].flights
    real = (
        1e3 * statistics.fmean(map(mean_itl_s, streams)),
        1e3 * percentile([stream.ttft_s for stream in streams], 95),
    )
    simulated = (
        1e3 * statistics.fmean(flight.mean_itl_s for flight in flights),
        1e3 * percentile([flight.ttft_s for flight in flights], 95),
    )
    return {
        "itl_ms": round(real[0], 2),
        "simulated_itl_ms": round(simulated[0], 2),
        "itl_ratio": round(simulated[0] / real[0], 2),
        "ttft_p95_ms": round(real[1], 1),
        "simulated_ttft_p95_ms": round(simulated[1], 1),
        "ttft_ratio": round(simulated[1] / real[1], 2),
    }


def main() -> None:
    """Print a row for each share of the full rate, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, for each share")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    model = arguments.model.resolve()
    read_once(model)
    words = vocab_size(model)
    start = partial(
        start_mizzen,
        model,
        "--dtype=bfloat16",
        f"--max-num-batched-tokens={STEP_TOKENS}",
        f"--max-model-len={MODEL_LEN}",
        "--max-num-seqs=64",
        threads=arguments.threads,
    )
    rows = Rows(f"Simulator beside engine: {model.name}, {arguments.threads} threads")
    with serving(start) as (server,):
        before = measure_profile(server, words=words)
        for seed, share in enumerate(arguments.shares):
            per_s = share * full_rate(before)
            requests = draw_requests(per_s, arguments.seconds, seed=seed)
            streams = asyncio.run(replay(server, requests, words=words))
            after = measure_profile(server, words=words)
            profile = between(before, after)
            rows.add(
                {
                    "share": round(per_s / full_rate(profile), 2),
                    "step_ms": round(1e3 * profile.step_s, 2),
                    "sequence_ms": round(1e3 * profile.step_per_sequence_s, 3),
                    "prompt_token_ms": round(1e3 * profile.step_per_prompt_token_s, 3),
                    "requests": len(requests),
                    **compare(streams, requests, profile),
                }
            )
            before = after
    rows.print_table()


if __name__ == "__main__":
    main()
