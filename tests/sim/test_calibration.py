"""The comparison of the simulator with an engine, fed with an engine that keeps its profile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.calibration import (
    NoisyMachineError,
    between,
    compare,
    draw_requests,
    full_rate,
    together_s,
)
from benchmarks.load_generator import Stream
from mizzen.operator.simulator.replica_profile import Profile
from mizzen.operator.simulator.traces import Request

PROFILE = Profile(
    step_s=0.02,
    step_per_sequence_s=0.001,
    step_per_prompt_token_s=0.001,
    budget_tokens=256,
    gpus=1,
)


def test_an_engine_that_keeps_its_profile_is_simulated_as_it_is() -> None:
    alone = Request(arrival_s=0.0, prompt_tokens=100, output_tokens=21)
    first_s, itl_s = 0.02 + 0.1, 0.021
    answer = Stream(0.0, tuple(first_s + itl_s * index for index in range(21)), 21)
    row = compare([answer], [alone], PROFILE)
    assert row["itl_ratio"] == 1.0
    assert 0.95 <= float(row["ttft_ratio"] or 0) <= 1.05


def test_an_engine_twice_as_slow_is_told_by_both_ratios() -> None:
    alone = Request(arrival_s=0.0, prompt_tokens=100, output_tokens=21)
    answer = Stream(0.0, tuple(0.24 + 0.042 * index for index in range(21)), 21)
    row = compare([answer], [alone], PROFILE)
    assert row["itl_ratio"] == 0.5
    assert 0.45 <= float(row["ttft_ratio"] or 0) <= 0.55


def test_a_running_sequence_costs_what_steps_take_while_all_of_them_run() -> None:
    early = Stream(0.0, (1.0, 3.0, 3.1, 3.2), 4)  # the gap of 2 s is the other's prompt
    late = Stream(0.0, (3.0, 3.1, 3.2, 4.0), 4)  # and that of 0.8 s is not shared
    assert together_s([early, late]) == pytest.approx(0.1)


def test_answers_one_after_another_say_nothing_of_how_they_run_together() -> None:
    first, second = Stream(0.0, (1.0, 1.1), 2), Stream(0.0, (2.0, 2.1), 2)
    with pytest.raises(NoisyMachineError, match="one after another"):
        together_s([first, second])


def test_requests_come_at_the_rate_asked_for() -> None:
    rate = 0.5 * full_rate(PROFILE)
    drawn = draw_requests(rate, 1000, seed=0)
    assert 0.9 <= len(drawn) / 1000 / rate <= 1.1
    assert [request.arrival_s for request in drawn] == sorted(r.arrival_s for r in drawn)


def test_a_run_is_held_against_the_mean_of_what_steps_cost_before_and_after_it() -> None:
    slower = replace(PROFILE, step_s=0.04, step_per_sequence_s=0.003)
    mean = between(PROFILE, slower)
    assert (mean.step_s, mean.step_per_sequence_s) == pytest.approx((0.03, 0.002))
    assert mean.step_per_prompt_token_s == PROFILE.step_per_prompt_token_s
    assert mean.budget_tokens == PROFILE.budget_tokens


@pytest.mark.parametrize("free_part", ["step_per_sequence_s", "step_per_prompt_token_s"])
def test_a_machine_on_which_more_work_takes_no_more_time_is_too_busy_to_measure(
    free_part: str,
) -> None:
    free = replace(PROFILE, **{free_part: 0.0})
    with pytest.raises(NoisyMachineError, match="while the machine does nothing else"):
        full_rate(free)
