"""When a drain is over, and when no node could ever take a pod."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from mizzen.operator.planning.capacity import largest_node, too_many_devices
from mizzen.operator.planning.drain import Drain, is_drained

NOW = datetime(2026, 9, 1, 12, 0, 0, tzinfo=UTC)


def drain(seconds_ago: float, in_flight: int | None, *, is_running: bool = True) -> Drain:
    return Drain(NOW - timedelta(seconds=seconds_ago), is_running, in_flight)


CASES = {
    "not while requests are in flight": (drain(60, 3), False),
    "as soon as the last has ended": (drain(60, 0), True),
    "not before every proxy can have heard of it": (drain(1, 0), False),
    "not without an answer": (drain(60, None), False),
    "at the limit, whatever is in flight": (drain(120, 3), True),
    "at the limit, without an answer": (drain(120, None), True),
    "at once, where no process runs": (drain(0, None, is_running=False), True),
}


@pytest.mark.parametrize(("drain", "expected"), CASES.values(), ids=CASES)
def test_a_replica_is_drained(drain: Drain, expected: bool) -> None:
    assert is_drained(drain, max_s=120, now=NOW) is expected


def test_the_largest_node_is_the_one_with_most_devices() -> None:
    nodes = [{"nvidia.com/gpu": "4"}, {"nvidia.com/gpu": "8", "cpu": "64"}, {"cpu": "2"}]
    assert largest_node("nvidia.com/gpu", nodes) == 8
    assert largest_node("amd.com/gpu", nodes) == 0
    assert largest_node("nvidia.com/gpu", []) == 0


def test_a_pod_that_fits_an_empty_node_is_not_too_large() -> None:
    assert too_many_devices("nvidia.com/gpu", wanted=8, largest=8) is None


def test_a_pod_that_fits_no_node_is_told_what_to_change() -> None:
    assert too_many_devices("nvidia.com/gpu", wanted=16, largest=8) == (
        "A pod asks for 16 nvidia.com/gpu and the largest node has 8. Lower "
        "spec.accelerator.count or spec.parallelism.tensor, spread the replica with "
        "spec.parallelism.nodes, or add larger nodes."
    )
    assert too_many_devices("nvidia.com/gpu", wanted=1, largest=0) == (
        "A pod asks for 1 nvidia.com/gpu and no node has any. Add nodes that have them, or set "
        "spec.accelerator.resource to what the nodes offer."
    )
