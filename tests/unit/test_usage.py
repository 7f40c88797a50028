"""How much each namespace has used of late: what is counted, how it fades, how it is kept."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from mizzen.operator.controllers.capacity_usage import Usage, read_usage
from mizzen.operator.planning.lending import next_usage
from mizzen.operator.planning.preemption import Lease

NOW = datetime(2026, 9, 1, 12, tzinfo=UTC)
DAY_S = 24 * 3600.0
GPU = "example.com/gpu"


def lease(job: str, **devices: int) -> Lease:
    return Lease(job=job, devices=devices, started_at=NOW, is_reclaimable=True)


def test_half_is_left_after_a_day_and_a_quarter_after_two() -> None:
    assert next_usage({"team": 1000.0}, [], elapsed_s=DAY_S) == {"team": 500.0}
    assert next_usage({"team": 1000.0}, [], elapsed_s=2 * DAY_S) == {"team": 250.0}


def test_many_short_looks_fade_like_a_long_one() -> None:
    usage = {"team": 1e6}
    for _ in range(100):
        usage = next_usage(usage, [], elapsed_s=DAY_S / 100)
    assert usage == pytest.approx({"team": 5e5})


def test_devices_count_by_namespace_over_all_its_jobs_and_nodes() -> None:
    leases = [lease("a/one", n1=2, n2=1), lease("a/two", n1=1), lease("b/one", n2=4)]
    assert next_usage({}, leases, elapsed_s=10.0) == {"a": 40.0, "b": 40.0}
    after = next_usage({"a": 1000.0, "c": 600.0}, leases, elapsed_s=DAY_S)
    assert after == {"a": 500.0 + 4 * DAY_S, "b": 4 * DAY_S, "c": 300.0}


def test_nothing_is_used_and_nothing_fades_while_time_stands_still() -> None:
    assert next_usage({"a": 7.0}, [lease("a/one", n1=8), lease("b/one", n1=8)], elapsed_s=0.0) == {
        "a": 7.0
    }


def test_a_job_without_a_place_uses_nothing_and_what_is_next_to_nothing_is_forgotten() -> None:
    assert next_usage({"old": 1.5}, [lease("new/job")], elapsed_s=DAY_S) == {}


def test_a_clock_that_was_set_back_counts_as_standing_still() -> None:
    usage = Usage({}, NOW)
    assert usage.elapsed_s(NOW + timedelta(seconds=5)) == 5.0
    assert usage.elapsed_s(NOW - timedelta(hours=1)) == 0.0
    assert Usage().elapsed_s(NOW) == 0.0


def test_a_text_holds_it_in_whole_seconds() -> None:
    usage = Usage({GPU: {"a": 12.4, "b": 7.0}, "example.com/other": {"a": 1.0}}, NOW)
    assert read_usage(usage.to_text()) == Usage(
        {GPU: {"a": 12.0, "b": 7.0}, "example.com/other": {"a": 1.0}}, NOW
    )


def test_a_text_stays_far_below_what_an_annotation_may_hold_and_keeps_the_largest() -> None:
    namespaces = {f"{number:063d}": float(number) for number in range(1, 10_001)}
    text = Usage({GPU: namespaces}, NOW).to_text()
    assert len(text) < 32 * 1024
    kept = read_usage(text).used_s[GPU]
    assert len(kept) == 200 and min(kept.values()) == 9801.0


def text_of(**fields: object) -> str:
    return json.dumps({"lookedAt": "2026-09-01T12:00:00Z", "usedSeconds": {}} | fields)


UNREADABLE = {
    "nothing": "",
    "no JSON": "{",
    "no object": "[]",
    "no time": text_of(lookedAt=None),
    "a time without a zone": text_of(lookedAt="2026-09-01T12:00:00"),
    "a list of namespaces": text_of(usedSeconds={GPU: ["a"]}),
    "words for seconds": text_of(usedSeconds={GPU: {"a": "many"}}),
    "endless seconds": text_of(usedSeconds={GPU: {"a": float("inf")}}),
    "no number of seconds": text_of(usedSeconds={GPU: {"a": float("nan")}}),
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_counts_as_nothing_used(text: str) -> None:
    assert read_usage(text) == Usage()
