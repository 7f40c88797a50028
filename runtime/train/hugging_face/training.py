"""A job that Hugging Face's Trainer runs: the gate's base, the steps, the candidate."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel

from mizzen.runtime.model.arch import find_checkpoint
from mizzen.runtime.train.batches import SampleOrder, total_steps
from mizzen.runtime.train.checkpoint import CheckpointStore, Counters
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.device import choose_dtype
from mizzen.runtime.train.digest import mark_model
from mizzen.runtime.train.errors import MicroBatchTooLargeError
from mizzen.runtime.train.evaluate import Examination, TallyStore
from mizzen.runtime.train.halving import is_out_of_memory
from mizzen.runtime.train.history import LossHistory
from mizzen.runtime.train.hugging_face.gate import HuggingFaceSubject, build_exams
from mizzen.runtime.train.hugging_face.model import (
    load_model,
    round_for_publishing,
    write_model,
)
from mizzen.runtime.train.hugging_face.rows import OrderedSamples
from mizzen.runtime.train.hugging_face.served import serve_base, serve_candidate
from mizzen.runtime.train.hugging_face.trainer import (
    ScheduledTrainer,
    build_arguments,
    find_checkpoint_in,
    rows_at_once,
)
from mizzen.runtime.train.hugging_face.watch import JobCallback
from mizzen.runtime.train.memory import need_of
from mizzen.runtime.train.progress import ProgressBoard, Verdict
from mizzen.runtime.train.stop import StopFlag, YieldRequested
from mizzen.runtime.train.suites.exam import Subject
from mizzen.runtime.train.surroundings import Surroundings

log = logging.getLogger(__name__)


class HuggingFaceTraining:
    """A job that is ready to train."""

    def __init__(
        self,
        config: TrainConfig,
        data: Prepared,
        around: Surroundings | None,
        *,
        device: torch.device,
        fingerprint: str,
        board: ProgressBoard,
        stop: StopFlag,
    ) -> None:
        hyper, directory = config.hyperparameters, config.checkpoint.directory
        self.data = data
        self._config = config
        self._around = around
        self._board = board
        self._device = device
        self._checkpoint = find_checkpoint(config.base_model)
        self._model = load_model(config, self._checkpoint, device)
        self._examination = Examination(
            exams=build_exams(config, data, around),
            micro_batch=hyper.micro_batch,
            store=TallyStore(directory, fingerprint=fingerprint),
            stop=stop,
        )
        self._store = CheckpointStore(
            directory,
            fingerprint=fingerprint,
            base=mark_model(self._checkpoint),
            generation=config.generation,
            keep=config.checkpoint.keep_last,
        )
        self._newest = self._store.find_newest()
        counters = self._newest[1] if self._newest else Counters()
        self._job = JobCallback(
            config=config,
            order=SampleOrder(data, seed=hyper.seed),
            counters=counters,
            history=LossHistory(directory, resumed_step=counters.step),
            board=board,
            stop=stop,
            commit=self._commit,
        )
        self._total_steps = total_steps(
            epoch_samples=self._job.order.epoch_samples,
            epochs=hyper.epochs,
            batch_size=hyper.batch_size,
            max_steps=hyper.max_steps,
        )
        self._trainer = self._build_trainer()
        if self._newest:
            board.committed(self._newest[0])
            log.info("Resuming from step %d.", self.step)

    @property
    def step(self) -> int:
        """The last whole step."""
        return self._job.counters.step

    def run(self) -> list[Verdict]:
        """Train to the end and ask the gate; return its verdicts.

        Raises:
            YieldRequested: somebody asked to stop; everything is committed.
            LossNotFiniteError: the job diverged.
            MicroBatchTooLargeError: memory ran out.
        """
        self._examination.ask_base(self._subject(is_base=True))
        self._board.plan(
            counters=self._job.counters,
            total_steps=self._total_steps,
            epoch=self._job.epoch,
            last=self._job.history.last,
        )
        self._board.enter("Running")
        self._train()
        self._commit()
        if self.step < self._total_steps:
            self._board.ended_early(self._job.spent)
        self._board.enter("Evaluating")
        round_for_publishing(self._model, checkpoint=self._checkpoint)
        verdicts = self._examination.ask_candidate(self._subject(is_base=False), step=self.step)
        loss = self._examination.loss(step=self.step)
        self._board.evaluated(eval_loss=loss, verdicts=verdicts)
        return verdicts

    def write(self, folder: Path) -> None:
        """Write the artifact's files."""
        write_model(self._model, folder, checkpoint=self._checkpoint)

    def drop(self) -> None:
        """Do nothing: what is not published was never written."""

    def _train(self) -> None:
        newest = find_checkpoint_in(self._newest[0].path) if self._newest else None
        try:
            self._trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        except YieldRequested:
            self._commit()
            log.info("Yielding at step %d.", self.step)
            raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MicroBatchTooLargeError(rows_at_once(self._config.hyperparameters)) from error

    def _commit(self) -> None:
        """Commit the state as it was after the last whole step."""
        # First the curve, so that no committed step is ever missing from it.
        self._job.history.sync()
        moving = [weight for weight in self._model.parameters() if weight.requires_grad]
        need = need_of(moving, moving)
        committed = self._store.commit_files(
            self._job.counters,
            self._trainer.save_checkpoint_into,
            need_bytes=need.weights + need.moments,
        )
        self._board.committed(committed)

    def _build_trainer(self) -> ScheduledTrainer:
        config, counters = self._config, self._job.counters
        hyper = config.hyperparameters
        # A budget that was used up before leaves no step to make, but weights to take.
        steps = counters.step if self._job.spent else self._total_steps
        return ScheduledTrainer(
            self._model,
            OrderedSamples(self._job.order, length=steps * hyper.batch_size),
            build_arguments(
                hyper,
                steps=steps,
                directory=config.checkpoint.directory,
                device=self._device,
                is_autocast=self._is_autocast,
            ),
            hyper=hyper,
            rate_steps=self._total_steps,
            callbacks=[self._job],
        )

    @property
    def _is_autocast(self) -> bool:
        """Whether weights that stay float32 are multiplied in bfloat16."""
        config = self._config
        dtype = choose_dtype(config.hyperparameters.dtype, self._device)
        return config.adaptation.type == "full" and dtype == torch.bfloat16

    def _subject(self, *, is_base: bool) -> HuggingFaceSubject:
        return HuggingFaceSubject(
            model=self._model,
            precision=lambda: self._precision(is_base=is_base),
            serve=lambda: self._serve(is_base=is_base),
        )

    def _serve(self, *, is_base: bool) -> Subject:
        around = self._around
        assert around is not None, "only suites that need it ask for it"
        if is_base:
            return serve_base(around)
        return serve_candidate(around, self._model, checkpoint=self._checkpoint)

    @contextlib.contextmanager
    def _precision(self, *, is_base: bool) -> Iterator[None]:
        """Compute as the steps do; the base of an adapter is the model with it switched off."""
        with contextlib.ExitStack() as inside:
            if self._is_autocast:
                inside.enter_context(torch.autocast(self._device.type, dtype=torch.bfloat16))
            if is_base and isinstance(self._model, PeftModel):
                inside.enter_context(self._model.disable_adapter())
            yield
