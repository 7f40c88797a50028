"""Ends a job that stands still: the next generation goes on from the last checkpoint.

Every loop of a job looks at the stop flag at each micro-batch, so a flag at which nobody looks is
a device, a volume or a peer that does not answer any more.
"""

from __future__ import annotations

import faulthandler
import logging
import threading
import time

from mizzen.runtime.errors import report_fatal
from mizzen.runtime.train.errors import TrainerHangsError
from mizzen.runtime.train.stop import EXIT_CRASH, StopFlag, leave

log = logging.getLogger(__name__)


def watch(stop: StopFlag, *, timeout_s: float) -> None:
    """Begin to watch, in a thread that lives as long as the process."""
    thread = threading.Thread(target=_watch, args=(stop, timeout_s), name="watchdog", daemon=True)
    thread.start()


def _watch(stop: StopFlag, timeout_s: float) -> None:
    while stop.silent_s < timeout_s:
        time.sleep(min(1.0, timeout_s / 10))
    faulthandler.dump_traceback()
    report_fatal(TrainerHangsError(timeout_s))
    leave(EXIT_CRASH)
