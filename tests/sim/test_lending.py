"""Idle GPUs of a simulated cluster lent to jobs, by the operator's own arbiter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mizzen.cli.commands import app
from mizzen.operator.planning.placement import Gang
from mizzen.operator.simulator.arbiter import Lending
from mizzen.operator.simulator.jobs import JobProfile, Lent, keep_queue
from mizzen.operator.simulator.outcome import Outcome
from mizzen.operator.simulator.pool import build_pool
from mizzen.operator.simulator.replica_profile import Profile, StartUp
from mizzen.operator.simulator.report import build_report
from mizzen.operator.simulator.simulation import Objective, Setting, simulate
from mizzen.operator.simulator.traces import Request
from tests.fixtures.scripted_policy import Script

LOAD_S, RESTART_S, LEAVE_S = 50.0, 30.0, 6.0


def exactly(seconds: float) -> StartUp:
    return StartUp(median_s=seconds, p90_s=seconds)


JOB = JobProfile(
    name="tune",
    gang=Gang(pods=1, devices=1),
    restart=exactly(RESTART_S),
    leave=exactly(LEAVE_S),
)
LENDING = Lending(mix=(JOB,))
SETTING = Setting(
    profile=Profile(
        step_s=0.02,
        step_per_sequence_s=0.0005,
        step_per_prompt_token_s=0.0001,
        gpus=1,
        start_up=exactly(LOAD_S),
    ),
    max_replicas=2,
    scrape_lag_s=0.0,
    lending=LENDING,
)


def run(steps: dict[float, int], setting: Setting = SETTING) -> Outcome:
    requests = [Request(index / 4, 200, 50) for index in range(1200)]
    return simulate(requests, Script(steps), setting)


def lent_of(outcome: Outcome) -> Lent:
    assert outcome.lent is not None
    return outcome.lent


def ready_at(outcome: Outcome, replicas: int) -> float:
    return next(moment.at for moment in outcome.moments if moment.ready == replicas)


def test_a_replica_waits_until_a_job_has_heard_of_it_and_left() -> None:
    outcome = run({0: 1, 160: 2})
    lent = lent_of(outcome)
    # A look after the replica was made, the notice, the leave, and a look after the job asked anew.
    waited_s = 0.2 + 1.0 + LEAVE_S + 1.3 + 0.2
    assert lent.preemptions == 1
    assert 0.2 + 1.0 + LEAVE_S <= lent.start_waits_s[0] <= waited_s + 1e-6
    assert ready_at(outcome, 2) == pytest.approx(160 + lent.start_waits_s[0] + LOAD_S, abs=5)
    assert ready_at(run({0: 1, 160: 2}, replace(SETTING, lending=None)), 2) == 160 + LOAD_S


def test_lent_time_is_start_and_kept_steps_and_leave() -> None:
    lent = lent_of(run({0: 1, 160: 2}))
    asked_at = 160.2
    assert lent.leases == 1
    assert lent.lent_gpu_hours == pytest.approx((asked_at + 1.0 + LEAVE_S) / 3600)
    assert lent.starting_gpu_hours == pytest.approx(RESTART_S / 3600)
    assert lent.useful_gpu_hours == pytest.approx((160 - RESTART_S) / 3600)
    parts = lent.starting_gpu_hours + lent.useful_gpu_hours + lent.leaving_gpu_hours
    assert parts == pytest.approx(lent.lent_gpu_hours)


def test_only_what_no_replica_holds_is_spare_and_only_after_the_warm_up() -> None:
    lent = lent_of(run({0: 1}))
    assert lent.lent_gpu_hours == pytest.approx(lent.spare_gpu_hours)
    late = lent_of(run({0: 1}, replace(SETTING, warm_up_s=100)))
    assert late.spare_gpu_hours == pytest.approx(lent.spare_gpu_hours - 100 / 3600)
    assert late.lent_gpu_hours == pytest.approx(lent.lent_gpu_hours - 100 / 3600)
    assert late.useful_gpu_hours == pytest.approx(lent.useful_gpu_hours - 70 / 3600)


def test_a_job_that_is_asked_while_it_starts_has_done_nothing_useful() -> None:
    lent = lent_of(run({0: 1, 20: 2}))
    assert lent.useful_gpu_hours == 0
    assert lent.starting_gpu_hours == pytest.approx(20.2 / 3600)


def test_a_job_too_slow_to_leave_is_ended_and_loses_its_steps_since_the_last_commit() -> None:
    slow = replace(JOB, leave=exactly(90.0), yield_within_s=20, checkpoint_s=60.0)
    lent = lent_of(run({0: 1, 160: 2}, replace(SETTING, lending=Lending(mix=(slow,)))))
    assert lent.fenced == 1
    assert 20 <= lent.start_waits_s[0] <= 25.2
    assert lent.useful_gpu_hours == pytest.approx(2 * 60 / 3600)


def test_the_reserve_is_never_lent_and_a_start_from_it_waits_only_for_a_look() -> None:
    lent = lent_of(run({0: 1, 160: 2}, replace(SETTING, lending=replace(LENDING, reserve=1))))
    assert lent.leases == 0
    assert lent.start_waits_s == (pytest.approx(0.2),)


def test_a_gang_is_lent_to_as_a_whole_and_leaves_as_a_whole() -> None:
    gang = replace(JOB, gang=Gang(pods=2, devices=4))
    profile = replace(SETTING.profile, gpus=4)
    setting = replace(SETTING, profile=profile, max_replicas=4, lending=Lending(mix=(gang,)))
    lent = lent_of(run({0: 1, 160: 3}, setting))
    # Twelve GPUs are spare: one gang of eight finds room, and none once three replicas are there.
    assert lent.lent_gpu_hours == pytest.approx(8 * (160.2 + 1.0 + LEAVE_S) / 3600)
    assert lent.preemptions == 1


def test_a_replica_that_is_not_wanted_any_more_waits_for_nothing() -> None:
    outcome = run({0: 1, 160: 2, 165: 1})
    lent = lent_of(outcome)
    assert lent.start_waits_s == ()
    assert lent.leases == 2, "what was asked for goes all the same and is lent anew"
    assert outcome.hours.loading == 0


def test_the_same_run_gives_the_same_figures_and_another_seed_others() -> None:
    varied = replace(JOB, leave=StartUp(median_s=6.0, p90_s=12.0))
    setting = replace(SETTING, lending=Lending(mix=(varied,)))
    steps = {0.0: 1, 160.0: 2}
    assert lent_of(run(steps, setting)) == lent_of(run(steps, setting))
    assert lent_of(run(steps, setting)) != lent_of(run(steps, replace(setting, seed=1)))


def test_the_report_says_what_was_lent_and_nothing_where_nothing_is() -> None:
    def report(outcome: Outcome):  # type: ignore[no-untyped-def]
        return build_report(outcome, policy="script", objective=Objective(), gpus=1)

    figures = report(run({0: 1, 160: 2})).lending
    assert figures.useful_share == pytest.approx(figures.useful_gpu_hours / figures.lent_gpu_hours)
    assert figures.start_wait_s_p50 == figures.start_wait_s_p95 > 7
    assert report(run({0: 1}, replace(SETTING, lending=None))).lending is None


@pytest.mark.parametrize(
    ("replicas", "gpus", "nodes"),
    [(3, 4, [8, 4]), (2, 8, [8, 8]), (5, 3, [6, 6, 3]), (2, 16, [16, 16]), (9, 1, [8, 1])],
)
def test_a_pool_is_filled_by_its_replicas(replicas: int, gpus: int, nodes: list[int]) -> None:
    pool = build_pool(replicas=replicas, gpus=gpus)
    assert list(pool.capacity.values()) == nodes
    assert pool.gpus == replicas * gpus


def test_the_queue_is_longer_than_the_pool_and_of_all_kinds() -> None:
    pair = replace(JOB, name="pair", gang=Gang(pods=1, devices=2))
    jobs = keep_queue((JOB, pair), gpus=12, seed=0)
    assert sum(job.profile.gpus for job in jobs) >= 12 + 3
    assert {job.profile.name for job in jobs} == {"tune", "pair"}
    assert {job.name.partition("/")[0] for job in jobs} == {"search", "support"}


def test_the_command_lends_where_it_is_told_to(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    row = {"prompt_tokens": 100, "output_tokens": 10}
    lines = [json.dumps(row | {"arrival_s": second}) for second in range(300)]
    trace.write_text("\n".join(lines))

    def figures(*options: str) -> dict[str, float] | None:
        base = ["simulate", "--trace", str(trace), "--format", "jsonl", "--max", "4", "--json"]
        done = CliRunner().invoke(app, [*base, *options])
        assert done.exit_code == 0, done.output
        found: dict[str, float] | None = json.loads(done.output)["lending"]
        return found

    assert figures() is None
    lent, kept = figures("--lend"), figures("--lend", "--reserve", "2")
    assert lent is not None and kept is not None
    assert lent["lent_gpu_hours"] == pytest.approx(lent["spare_gpu_hours"])
    assert kept["lent_gpu_hours"] == pytest.approx(kept["spare_gpu_hours"] / 3)


def test_a_reserve_without_lending_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({"prompt_tokens": 1, "output_tokens": 1, "arrival_s": 0}))
    base = ["simulate", "--trace", str(trace), "--format", "jsonl"]
    done = CliRunner().invoke(app, [*base, "--reserve", "2"])
    assert done.exit_code == 2
    assert "Add --lend" in done.output
