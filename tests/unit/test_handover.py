"""A device's memory is looked at before anybody loads a model into it."""

import logging
from collections.abc import Iterator

import pytest
import torch

from mizzen.runtime.handover import MIB, wait_for_memory

GPU = torch.device("cuda")
TOTAL = 80_000 * MIB


def waited_s(free_mib: Iterator[int]) -> float:
    """Return how long is waited where each look, half a second apart, shows so much memory."""
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    wait_for_memory(
        GPU, look=lambda _: (next(free_mib) * MIB, TOTAL), now_s=lambda: now_s, sleep=sleep
    )
    return now_s


STORIES = {
    "a device that is free is taken at once": ([79_000], 0.0),
    "memory that comes back is waited for": ([2_000] * 12 + [40_000] * 20 + [79_000], 16.0),
    "one that takes its time to begin as well": ([0] * 28 + [79_000], 14.0),
    "a device that somebody shares is not waited for for ever": ([40_000] * 100, 15.0),
    "nor one where somebody takes and gives back a little": ([40_000, 40_500] * 50, 15.0),
}


@pytest.mark.parametrize(("free_mib", "expected_s"), STORIES.values(), ids=STORIES)
def test_before_a_model_is_loaded(free_mib: list[int], expected_s: float) -> None:
    assert waited_s(iter(free_mib)) == expected_s


def test_what_others_keep_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        waited_s(iter([60_000] * 100))
    assert caplog.messages == [
        "Others hold 20000 of the device's 80000 MiB and give none back; going on with the rest."
    ]


def test_a_cpu_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(_: torch.device) -> tuple[int, int]:
        raise AssertionError("there is nothing to look at")

    wait_for_memory(torch.device("cpu"), look=look)
