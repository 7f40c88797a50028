"""An engine's steps: what a run of many computes is what single steps would have."""

import random
from collections import Counter

import pytest

from mizzen.operator.simulator.replica import Flight, Replica
from mizzen.operator.simulator.replica_profile import Profile
from mizzen.operator.simulator.traces import Request

PROFILE = Profile(
    step_s=0.02,
    step_per_sequence_s=0.001,
    step_per_prompt_token_s=0.0001,
    kv_tokens=1000,
    max_sequences=8,
    budget_tokens=100,
)


def serve(requests: list[Request], profile: Profile = PROFILE) -> list[Flight]:
    """Bring each request at its time, and go on until all are served."""
    replica = Replica(0, profile, Counter())
    flights = [Flight(request) for request in requests]
    coming = list(flights)
    while coming or replica.ends_at is not None:
        if coming and (replica.ends_at is None or coming[0].request.arrival_s < replica.ends_at):
            flight = coming.pop(0)
            replica.submit(flight, flight.request.arrival_s)
        else:
            replica.advance()
    assert replica.kv_reserved == 0
    assert replica.kv_used(1e9) == 0
    assert replica.output_tokens == sum(r.output_tokens for r in requests)
    return flights


def test_a_lone_request_takes_its_prefill_and_one_step_for_each_further_token() -> None:
    (flight,) = serve([Request(0.0, 50, 11)])
    assert flight.first_token_at == pytest.approx(0.02 + 50 * 0.0001)
    assert flight.mean_itl_s == pytest.approx(0.021)


def test_a_prompt_over_the_token_budget_is_computed_in_chunks() -> None:
    (flight,) = serve([Request(0.0, 250, 1)])
    assert flight.first_token_at == pytest.approx(3 * 0.02 + 250 * 0.0001)
    assert flight.finished_at == flight.first_token_at


def test_an_arrival_waits_for_the_end_of_the_step_it_falls_into() -> None:
    _, second = serve([Request(0.0, 10, 100), Request(0.0715, 10, 1)])
    # First token at 0.021, then steps of 0.021: the third of them ends at 0.084.
    assert second.first_token_at == pytest.approx(0.084 + 0.021 + 0.001)


def test_a_prefill_slows_the_streams_beside_it_and_only_for_its_step() -> None:
    alone, _ = serve([Request(0.0, 10, 100), Request(50.0, 10, 1)])
    beside, _ = serve([Request(0.0, 10, 100), Request(1.0, 90, 1)])
    assert beside.finished_at is not None and alone.finished_at is not None
    # The step with the prompt counts one decoding sequence and 90 prompt tokens.
    assert beside.finished_at - alone.finished_at == pytest.approx(90 * 0.0001)


def test_a_request_waits_until_its_keys_and_values_fit_and_passes_nobody() -> None:
    big, blocked, small = serve([Request(0.0, 600, 100), Request(0.1, 500, 1), Request(0.2, 10, 1)])
    assert big.finished_at is not None
    assert blocked.first_token_at is not None and blocked.first_token_at > big.finished_at
    assert small.first_token_at is not None and small.first_token_at >= blocked.first_token_at


def test_a_cached_beginning_of_a_prompt_is_not_computed_again() -> None:
    profile = Profile(budget_tokens=4096, kv_tokens=100_000)
    first, second = serve(
        [Request(0.0, 1100, 1, (1, 2, 3)), Request(10.0, 1100, 1, (1, 2, 9))], profile
    )
    computed = first.ttft_s - second.ttft_s
    assert computed == pytest.approx(1024 * profile.step_per_prompt_token_s)


def test_runs_of_steps_equal_single_steps() -> None:
    chance = random.Random(7)
    requests, at = [], 0.0
    for _ in range(60):
        at += chance.expovariate(6)
        requests.append(Request(at, chance.randint(1, 250), chance.randint(1, 40)))
    by_run = [(f.first_token_at, f.finished_at) for f in serve(requests)]
    assert by_run == [pytest.approx(pair) for pair in serve_step_by_step(requests)]


def serve_step_by_step(requests: list[Request]) -> list[tuple[float, float]]:
    """The same engine written down plainly: every step on its own."""
    now, coming, waiting = 0.0, list(enumerate(requests)), []
    running: list[list[int]] = []  # [who, prompt left, output left]
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    reserved = 0
    while coming or waiting or running:
        if not running and not waiting:
            now = max(now, coming[0][1].arrival_s)
        while coming and coming[0][1].arrival_s <= now:
            waiting.append(coming.pop(0))
        decoding = [one for one in running if one[1] == 0]
        budget = PROFILE.budget_tokens - len(decoding)
        prompt_tokens, ending = 0, []
        while budget > 0:
            one = next((one for one in running if one[1] > 0), None)
            if one is None:
                if not waiting:
                    break
                who, request = waiting[0]
                need = request.prompt_tokens + request.output_tokens
                if reserved + need > PROFILE.kv_tokens or len(running) >= PROFILE.max_sequences:
                    break
                waiting.pop(0)
                reserved += need
                one = [who, request.prompt_tokens, request.output_tokens]
                running.append(one)
            chunk = min(one[1], budget)
            one[1] -= chunk
            budget -= chunk
            prompt_tokens += chunk
            if one[1] == 0:
                ending.append(one)
        now += PROFILE.step_s + PROFILE.step_per_sequence_s * len(decoding)
        now += PROFILE.step_per_prompt_token_s * prompt_tokens
        for one in ending:
            first[one[0]] = now
        for one in (*decoding, *ending):
            one[2] -= 1
            if one[2] == 0:
                last[one[0]] = now
                running.remove(one)
                request = requests[one[0]]
                reserved -= request.prompt_tokens + request.output_tokens
    return [(first[who], last[who]) for who in range(len(requests))]
