"""`mizzen train`: the process around a job, and what its exit code says.

0 done, 75 yielded and the next run goes on from what is committed, 42 only a changed job can
succeed, 76 another worker was lost, 1 try again.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mizzen.runtime.errors import (
    BadAdapterError,
    BadModelError,
    MizzenError,
    RankLostError,
    report_fatal,
)
from mizzen.runtime.train.config import TrainerEnvironment, load_config
from mizzen.runtime.train.errors import JobError
from mizzen.runtime.train.stop import EXIT_CRASH, EXIT_DONE, StopFlag, leave

log = logging.getLogger(__name__)


def train(config_path: Path) -> int:
    """Run one generation of the job described at `config_path`; return 0 once it is done.

    Any other end is the process's: the interpreter's shutdown would wait for threads that ask a
    teacher or a judge again, or for a rank that is lost, while somebody waits for the device.
    """
    stop = StopFlag()
    stop.listen_to_signals()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        code = _run(config_path, stop)
    except (JobError, BadModelError, BadAdapterError, RankLostError) as error:
        code = report_fatal(error)
    except MizzenError as error:
        report_fatal(error)
        code = EXIT_CRASH
    except Exception:
        log.exception("The trainer crashed.")
        code = EXIT_CRASH
    if code != EXIT_DONE:
        leave(code)
    return code


def _run(config_path: Path, stop: StopFlag) -> int:
    config = load_config(config_path)
    # A thread that spins while it waits takes the core another process needs: on two contended
    # cores that made steps ten times longer. Read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with stop.nothing_to_lose():
        # torch takes seconds to import, and as a container's first process we would ignore a
        # SIGTERM that comes before our handler is set.
        from mizzen.runtime.train.job import run_job  # noqa: PLC0415
    return run_job(config, TrainerEnvironment(), stop)
