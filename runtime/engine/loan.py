"""A training job on the served weights, in a thread of its own that stands still for requests.

The thread looks up at every linear of every layer, so it has stopped before a request's first
step has ended. The loop never waits for it: until it has stopped it has the lowest priority a
thread can have, and takes only what processors the request leaves.
"""

import contextlib
import gc
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from mizzen.runtime.engine.api import LoanState
from mizzen.runtime.engine.errors import InvalidRequestError
from mizzen.runtime.engine.heap import give_back_freed
from mizzen.runtime.engine.idle import busy
from mizzen.runtime.errors import BadAdapterError, BadModelError, MizzenError
from mizzen.runtime.kernels.team import dismiss_team
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.twin import twin_of
from mizzen.runtime.parallel.connect import Meeting, connect
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.errors import JobConfigError, JobError
from mizzen.runtime.train.lendable import read_loan
from mizzen.runtime.train.loan import run_loan
from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.stop import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_YIELDED,
    StopFlag,
    YieldRequested,
)
from mizzen.runtime.train.surroundings import Resident
from mizzen.runtime.train.workers import Workers

log = logging.getLogger(__name__)

# How often a job that stands still looks whether it may go on: a rest between two requests that
# is shorter is not worth beginning in.
_REST_S = 0.02
_NICENESS = 19
# An operator asks every few seconds. One that does so no more has deleted the job, or is gone.
PATIENCE_S = 60.0
_MEET_S = 60.0
_STANDING_STILL_S = 10 * 365 * 86_400.0  # for a rank, between two collectives


class _End(NamedTuple):
    """How a trainer's process would have ended."""

    exit_code: int
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class MeetingPoint:
    """Where the ranks of a replica meet for a loan, and which of them this is."""

    rank: int
    size: int
    store: Path  # a file that all of them reach
    folder: tempfile.TemporaryDirectory[str] | None = None  # that it lies in, if ours to remove


class Loan:
    """One generation of one job, from its start to its end, as one rank of the replica sees it.

    Rank 0 stands still while requests are there, and the others with it: at the next sum over the
    ranks at the latest. Only where all of them look up together can one of them stop.
    """

    def __init__(
        self,
        config: TrainConfig,
        decoder: Decoder,
        is_wanted: Callable[[], bool],
        *,
        spare_bytes: Callable[[], int],
        step_tokens: int,
        ranks: MeetingPoint | None = None,
    ) -> None:
        """Prepare it; `is_wanted` says whether somebody else wants the weights.

        `spare_bytes` and `step_tokens` are those of `Resident`.
        """
        self._ranks = ranks
        self._workers = Workers()
        self.config = config
        self._decoder: Decoder | None = decoder
        self._is_wanted = is_wanted
        self._spare_bytes, self._step_tokens = spare_bytes, step_tokens
        self._stop = StopFlag()
        self._board = ProgressBoard(generation=config.generation)
        self._outcome: _End | None = None
        self._end: _End | None = None  # the outcome, once nothing is held any more
        self._ended_at = ""
        self._asked_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="mizzen-loan", daemon=True)
        self._training = threading.Thread(
            target=self._train_below_all, name="mizzen-training", daemon=True
        )

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def is_of(self, config: TrainConfig) -> bool:
        """Whether it is this generation of this job."""
        return _identity(self.config) == _identity(config)

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self._end is not None

    @property
    def step(self) -> int:
        """The last whole step."""
        return int(self._board.document()["step"] or 0)

    def ask_to_stop(self) -> None:
        """Have it commit its last whole step and end."""
        self._stop.ask()

    def wait(self) -> None:
        """Block until it holds nothing of the model any more."""
        self._thread.join()

    def state(self) -> LoanState:
        """Return how far it is, or how it ended; to ask is also to show that one is there."""
        self._asked_at = time.monotonic()
        end = self._end
        return LoanState(
            job=self.config.job,
            generation=self.config.generation,
            directory=str(self.config.checkpoint.directory),
            progress=json.dumps(self._board.document()),
            exit_code=None if end is None else end.exit_code,
            ended_at=self._ended_at,
            reason="" if end is None else end.reason,
            message="" if end is None else end.message,
        )

    def _run(self) -> None:
        self._training.start()
        self._training.join()
        self._workers.tensor.leave()  # where this rank has failed, none must wait for it
        # Not by that thread, which cannot raise its priority again: a collection holds the
        # interpreter's lock throughout, and where the machine is busy the loop would wait for a
        # thread that gets next to nothing of it.
        self._decoder = None
        gc.collect()  # what hooks hold on to is in circles, and the weights are among it
        give_back_freed()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # else the next job would find it taken
        self._ended_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._end = self._outcome
        log.info("The loan to %s has ended: %s", self.config.job, self._end)

    def _train_below_all(self) -> None:
        assert self._decoder is not None, "it runs once"
        if (device := self._decoder.place.device).type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own choice
        with contextlib.suppress(OSError):
            # Linux has a priority for each thread, and those that this one starts inherit it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        self._outcome = self._train()

    def _train(self) -> _End:
        try:
            self._meet_ranks()
            resident = Resident(self._view(), self._give_way, self._spare, self._step_tokens)
            run_loan(
                self.config,
                resident,
                board=self._board,
                stop=self._stop,
                workers=self._workers,
            )
        except YieldRequested:
            return _End(EXIT_YIELDED)
        except (JobError, BadModelError, BadAdapterError) as error:
            return _End(error.exit_code, error.reason, str(error))
        except MizzenError as error:
            return _End(EXIT_CRASH, error.reason, str(error))
        except Exception as error:
            log.exception("A job on lent weights has failed.")
            return _End(EXIT_CRASH, message=f"{type(error).__name__}: {error}")
        return _End(EXIT_DONE)

    def _meet_ranks(self) -> None:
        if self._ranks is None:
            return
        # Over the host's memory, also where the model is on GPUs: a rank that waits for one which
        # stands still must not keep a kernel running meanwhile.
        meeting = Meeting(
            size=self._ranks.size,
            store=self._ranks.store,
            device=torch.device("cpu"),
            timeout_s=_MEET_S,
        )
        try:
            group = connect(self._ranks.rank, meeting)
        finally:
            # All have come. Left there, the file is written to once more when a group goes, and
            # where that fails torch ends the process.
            if self._ranks.folder is not None:
                self._ranks.folder.cleanup()
        group.wait_at_most(_STANDING_STILL_S)
        self._workers = Workers(tensor=group)

    def _view(self) -> Decoder:
        assert self._decoder is not None, "it runs once"
        group = self._workers.tensor
        return self._decoder if group.size == 1 else twin_of(self._decoder, group)

    def _spare(self) -> int:
        give_back_freed()
        return self._spare_bytes()

    def _give_way(self) -> None:
        assert self._decoder is not None, "it runs once"
        device = self._decoder.place.device
        if device.type == "cuda":
            # The host would launch whole layers ahead, and a request queue behind all of them.
            torch.cuda.current_stream(device).synchronize()
        if self._workers.is_leader and time.monotonic() - self._asked_at > PATIENCE_S:
            self._stop.ask()
        if self._is_wanted():
            dismiss_team()
        while self._is_wanted() and not self._stop.is_asked:
            time.sleep(_REST_S)
        if self._ranks is None:
            self._stop.check()


def _identity(config: TrainConfig) -> tuple[str, int, Path]:
    return config.job, config.generation, config.checkpoint.directory


def read_lent(job: str, decoder: Decoder, path: Path) -> TrainConfig:
    """Return the job that can run beside weights that were read from `path`.

    Raises:
        EngineBusyError: these are not the weights of its base.
        InvalidRequestError: it can run beside no such weights; the message says what to change.
    """
    try:
        config = read_loan(job)
    except JobConfigError as error:
        raise InvalidRequestError(str(error)) from error
    if config.base_model.resolve() != path.resolve():
        # Not for ever: other replicas of a deployment, or this one later, may serve its base.
        raise busy(f"The job's base is {config.base_model}, and this replica serves {path}.")
    if not decoder.lets_gradients_through:
        raise InvalidRequestError(
            "Nothing can learn beside weights that are kept in few bits. Serve them without "
            "quantization, or take mode: Pod."
        )
    return config
