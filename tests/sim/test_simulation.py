"""Whole simulations on small made-up traffic, and one on a recorded hour where it is present."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mizzen.cli.commands import app
from mizzen.operator.simulator.experiment import best_static, run_policy
from mizzen.operator.simulator.outcome import Moment, Outcome, ScaleEvent
from mizzen.operator.simulator.plot import turning_points
from mizzen.operator.simulator.replica_profile import Profile, StartUp
from mizzen.operator.simulator.report import build_report, count_reversals, demand
from mizzen.operator.simulator.simulation import (
    Objective,
    RequestTooLargeError,
    Setting,
    simulate,
)
from mizzen.operator.simulator.traces import Request
from tests.fixtures.scripted_policy import Script

PROFILE = Profile(
    step_s=0.02,
    step_per_sequence_s=0.0005,
    step_per_prompt_token_s=0.0001,
    gpus=1,
    start_up=StartUp(median_s=50, p90_s=50),
)
SETTING = Setting(profile=PROFILE, max_replicas=8, scrape_lag_s=0.0)


def steady(*, per_s: float, seconds: float, prompt: int = 200, output: int = 50) -> list[Request]:
    return [Request(i / per_s, prompt, output) for i in range(int(per_s * seconds))]


def run(steps: dict[float, int], setting: Setting = SETTING) -> tuple[Outcome, Script]:
    script = Script(steps)
    return simulate(steady(per_s=4, seconds=300), script, setting), script


def test_every_request_is_answered_and_loading_and_draining_are_paid_for() -> None:
    outcome, script = run({0: 1, 60: 3, 200: 1})
    assert all(flight.finished_at is not None for flight in outcome.flights)
    assert outcome.hours.loading == pytest.approx(2 * 50 / 3600)
    assert outcome.hours.draining > 0
    assert outcome.hours.total > outcome.counted_s / 3600 + 2 * 140 / 3600
    assert [(e.at, e.before, e.after) for e in outcome.events] == [(60, 1, 3), (200, 3, 1)]
    by_time = {now: (ready, starting) for now, ready, starting, _, _ in script.views}
    assert by_time[105] == (1, 2)
    assert by_time[115] == (3, 0)


def test_a_drain_waits_for_its_streams_and_cuts_them_only_at_its_limit() -> None:
    gentle, _ = run({0: 3, 100: 1}, replace(SETTING, initial_replicas=3))
    assert gentle.cut == 0
    hasty, _ = run({0: 3, 100: 1}, replace(SETTING, initial_replicas=3, drain_s=0.1))
    unfinished = [f for f in hasty.flights if f.finished_at is None]
    assert hasty.cut == len(unfinished) > 0


def test_starting_replicas_go_before_ready_ones() -> None:
    outcome, _ = run({0: 2, 60: 4, 70: 2}, replace(SETTING, initial_replicas=2))
    assert outcome.hours.draining == 0
    assert outcome.hours.loading == pytest.approx(2 * 10 / 3600)


def test_a_policy_sees_samples_only_after_the_lag_and_none_from_a_gap() -> None:
    setting = replace(SETTING, scrape_lag_s=7.0, gaps=((100.0, 150.0),))
    _, script = run({0: 1}, setting)
    newest = {now: at for now, _, _, _, at in script.views}
    assert newest[60] == 50
    assert newest[145] == 95
    assert newest[170] == 160


def test_a_replica_that_never_starts_takes_no_request() -> None:
    outcome, script = run({0: 1, 20: 2}, replace(SETTING, unstartable=frozenset({1})))
    assert script.views[-1][1:3] == (1, 1)
    assert all(flight.finished_at is not None for flight in outcome.flights)


def test_requests_are_held_from_zero_until_a_replica_is_ready() -> None:
    setting = replace(SETTING, initial_replicas=0, min_replicas=0)
    outcome, _ = run({0: 0, 30: 1}, setting)
    assert outcome.flights[0].ttft_s == pytest.approx(80, abs=1)
    assert outcome.flights[-1].ttft_s < 1


def test_the_pool_bounds_what_can_start_while_draining_replicas_hold_their_gpus() -> None:
    setting = replace(SETTING, max_replicas=2, initial_replicas=2)
    requests = [Request(0.0, 200, 4000), Request(0.01, 200, 4000), *steady(per_s=1, seconds=120)]
    requests.sort(key=lambda r: r.arrival_s)
    script = Script({0: 2, 20: 1, 30: 2})
    outcome = simulate(requests, script, setting)
    assert max(sum(view[1:4]) for view in script.views) == 2
    assert outcome.cut == 0


def test_start_up_times_are_the_same_under_every_policy_and_spread_as_asked() -> None:
    start_up = StartUp(median_s=100, p90_s=150)
    drawn = sorted(start_up.draw_s(seed=1, replica=n) for n in range(400))
    assert drawn[200] == pytest.approx(100, rel=0.08)
    assert drawn[360] == pytest.approx(150, rel=0.1)
    assert start_up.draw_s(seed=1, replica=7) == start_up.draw_s(seed=1, replica=7)


def test_a_request_that_fits_no_replica_is_refused_with_both_numbers() -> None:
    with pytest.raises(RequestTooLargeError, match=r"600000 tokens .* 450000"):
        simulate([Request(0.0, 599_999, 1)], Script({0: 1}), SETTING)


def test_the_report_adds_up() -> None:
    outcome, _ = run({0: 1, 60: 3, 200: 1})
    objective = Objective(ttft_s=2.0, itl_s=0.1)
    report = build_report(outcome, policy="script", objective=objective, gpus=4)
    assert report.attainment == 1.0
    assert report.gpu_hours == pytest.approx(4 * outcome.hours.total)
    assert report.ttft_ms.p50 is not None and report.ttft_ms.p50 >= 40
    assert report.itl_ms.p50 is not None and 20 <= report.itl_ms.p50 <= 30
    assert report.reversals == 1
    strict = build_report(
        outcome, policy="script", objective=Objective(ttft_s=0.001, itl_s=0.1), gpus=4
    )
    assert strict.attainment == 0.0
    assert strict.worst_five_minutes.attainment == 0.0


def test_reversals_are_opposite_steps_within_ten_minutes() -> None:
    steps = [(0, 1, 2), (100, 2, 3), (200, 3, 2), (900, 2, 4), (1000, 4, 3)]
    assert count_reversals([ScaleEvent(*step) for step in steps]) == 2


def test_demand_is_measured_in_replicas() -> None:
    requests = steady(per_s=10, seconds=60)
    work = demand(requests, PROFILE, Objective(itl_s=0.1), bin_s=30)
    # 10/s * (50 * 0.5 ms + 200 * 0.1 ms) / (1 - 20/100)
    assert work == [(0, pytest.approx(0.5625)), (30, pytest.approx(0.5625))]


def test_a_warm_up_is_simulated_and_not_counted() -> None:
    whole, _ = run({0: 1, 60: 3, 200: 1})
    late, _ = run({0: 1, 60: 3, 200: 1}, replace(SETTING, warm_up_s=100))
    assert len(late.flights) == len(whole.flights) - 400
    assert [event.at for event in late.events] == [200]
    assert late.hours.loading == pytest.approx(2 * 10 / 3600)
    assert late.hours.total == pytest.approx(whole.hours.total - (100 + 2 * 40) / 3600)
    with pytest.raises(ValueError, match="within the warm-up of 900 s"):
        run({0: 1}, replace(SETTING, warm_up_s=900))


def test_the_best_fixed_size_is_the_smallest_that_keeps_the_promise() -> None:
    requests = steady(per_s=40, seconds=60)
    _, best = best_static(requests, SETTING)
    _, fewer = run_policy("static", requests, SETTING, target=int(best.policy[13:-1]) - 1)
    assert best.attainment >= 0.95 > fewer.attainment


def test_our_policy_follows_a_load_that_rises_and_never_goes_down_in_a_gap() -> None:
    requests = [*steady(per_s=4, seconds=600)]
    requests += [replace(r, arrival_s=600 + r.arrival_s) for r in steady(per_s=40, seconds=900)]
    requests += [replace(r, arrival_s=1500 + r.arrival_s) for r in steady(per_s=2, seconds=1500)]
    gap = (1500.0, 2400.0)
    outcome, report = run_policy("mizzen", requests, replace(SETTING, gaps=(gap,)))
    assert max(event.after for event in outcome.events) >= 3
    assert report.cut_streams == report.unfinished == 0
    in_gap = [e for e in outcome.events if gap[0] + 10 < e.at < gap[1] and e.after < e.before]
    assert in_gap == []
    assert outcome.events[-1].after < max(event.after for event in outcome.events)


def test_the_command_prints_json_and_names_bad_input(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [asdict_of(request) for request in steady(per_s=2, seconds=60)]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    base = ["simulate", "--trace", str(trace), "--format", "jsonl", "--policy"]
    done = CliRunner().invoke(app, [*base, "mizzen", "--json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.output)
    assert figures["requests"] == 120
    assert figures["gpu_hours"] > 0
    text = CliRunner().invoke(app, [*base, "static-best"])
    assert "attainment" in text.output
    for arguments, said in (
        (["nobody"], "There is no policy 'nobody'"),
        (["static", "--plot", "picture.pdf"], "neither .svg nor .png"),
        (["static", "--format", "parquet"], "no trace format"),
        (["static", "--min", "5", "--max", "2"], "--min"),
    ):
        refused = CliRunner().invoke(app, [*base, *arguments])
        assert refused.exit_code == 2
        assert said in refused.output


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `simulator` is not installed")
    trace = tmp_path / "trace.jsonl"
    rows = [asdict_of(request) for request in steady(per_s=2, seconds=120)]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    picture = tmp_path / "run.svg"
    base = ["simulate", "--trace", str(trace), "--format", "jsonl", "--plot", str(picture)]
    assert CliRunner().invoke(app, base).exit_code == 0
    drawn = picture.read_text()
    assert "attainment" in drawn
    assert CliRunner().invoke(app, base).exit_code == 0
    assert picture.read_text() == drawn, "the same run gives the same file"


def test_a_picture_keeps_only_the_moments_at_which_something_changes() -> None:
    counts = [1, 1, 1, 2, 2, 2, 2]
    moments = [
        Moment(at=5.0 * index, wanted=2, ready=ready, starting=2 - ready, draining=0)
        for index, ready in enumerate(counts)
    ]
    assert [moment.at for moment in turning_points(moments)] == [0.0, 10.0, 15.0, 30.0]


def asdict_of(request: Request) -> dict[str, float]:
    return {
        "arrival_s": request.arrival_s,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens,
    }


def test_azures_hour_of_code_is_replayed_with_fewer_gpu_hours_than_its_peak_needs() -> None:
    folder = Path(os.environ.get("MIZZEN_TRACES", "../shared/data/traces"))
    trace = folder / "azure2023_code.csv"
    if not trace.exists():
        pytest.skip(f"no Azure trace in {folder}: set MIZZEN_TRACES to the traces' folder")
    done = CliRunner().invoke(app, ["simulate", "--trace", str(trace), "--json"])
    assert done.exit_code == 0, done.output
    ours = json.loads(done.output)
    fixed = CliRunner().invoke(
        app, ["simulate", "--trace", str(trace), "--json", "--policy", "static", "--target", "12"]
    )
    assert ours["gpu_hours"] < json.loads(fixed.output)["gpu_hours"]
    assert ours["reversals_per_hour"] <= 6
    assert ours["cut_streams"] == 0
