"""The ends of ranks' processes, as the threads that wait for them are told."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from mizzen.runtime.parallel.processes import RankProcesses
from tests.fixtures.rank_work import echo_sum


class ToldOnce:
    """An ended process whose exit code goes to the first thread that asks, and takes its time."""

    name = "Rank 1"

    def __init__(self) -> None:
        self.sentinel, theirs = os.pipe()
        os.close(theirs)  # as an end does
        self.exitcode: int | None = None
        self.is_asked = threading.Event()
        self.may_answer = threading.Event()

    def is_alive(self) -> bool:
        return False

    def join(self) -> None:
        if self.is_asked.is_set():
            return
        self.is_asked.set()
        assert self.may_answer.wait(60)
        self.exitcode = -9


def test_a_rank_s_end_is_told_with_its_exit_code_also_while_others_ask_for_it() -> None:
    process = ToldOnce()
    processes = RankProcesses(range(1, 2), echo_sum, ())
    processes._processes = [process]
    try:
        with ThreadPoolExecutor() as threads:
            killing = threads.submit(processes.kill)
            assert process.is_asked.wait(60)
            watching = threads.submit(processes.wait_for_end)
            time.sleep(0.2)  # for one that must not go ahead
            process.may_answer.set()
            killing.result(60)
            assert watching.result(60) == "Rank 1 ended with exit code -9."
    finally:
        os.close(process.sentinel)
