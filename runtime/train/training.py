"""A job whose weights learn: notes of a frozen model, the gate's base, the loop, the candidate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.errors import RankLostError
from mizzen.runtime.model.arch import find_checkpoint
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.adaptation import Adapted, adapt, load_base
from mizzen.runtime.train.batches import SampleOrder
from mizzen.runtime.train.checkpoint import CheckpointStore, Counters, TrainState
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.device import choose_dtype
from mizzen.runtime.train.digest import mark_model
from mizzen.runtime.train.errors import RoleLostError
from mizzen.runtime.train.evaluate import Examination, TallyStore
from mizzen.runtime.train.generate import drawn_at_once
from mizzen.runtime.train.giving_way import GivingWay
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.history import LossHistory, note_holdout
from mizzen.runtime.train.ledger import DiskLedger, Ledger, NoLedger
from mizzen.runtime.train.loop import Loop, LoopParts
from mizzen.runtime.train.methods.distill import Distill
from mizzen.runtime.train.methods.distill_sequence import SequenceDistill
from mizzen.runtime.train.methods.method import Method, NotedMethod
from mizzen.runtime.train.notes import Ask, NoteStore, take_notes
from mizzen.runtime.train.progress import ProgressBoard, Verdict
from mizzen.runtime.train.samples import Item
from mizzen.runtime.train.shared_store import FollowingLedger, LeadingStore, SharedCheckpoints
from mizzen.runtime.train.stop import Stop, YieldRequested
from mizzen.runtime.train.suites.build import build_exams, build_validation
from mizzen.runtime.train.suites.exam import Subject
from mizzen.runtime.train.surroundings import Surroundings
from mizzen.runtime.train.teacher import ServedTeacher
from mizzen.runtime.train.together import SharedNotes, SharedTallies, Together
from mizzen.runtime.train.trainable import WEIGHTS
from mizzen.runtime.train.utilization import peak_tokens_per_second
from mizzen.runtime.train.validation import Validation
from mizzen.runtime.train.workers import Workers

log = logging.getLogger(__name__)


class Training:
    """A job that is ready to train."""

    def __init__(
        self,
        around: Surroundings,
        method: Method,
        data: Prepared,
        *,
        fingerprint: str,
        board: ProgressBoard,
        workers: Workers,
    ) -> None:
        config, device = around.config, around.device
        directory = config.checkpoint.directory
        self._config = config
        self._method = method
        self._board = board
        self._workers = workers
        self._ranks = ranks = Together(workers.tensor, device)
        self._stop: Stop = around.stop
        self._tokenizer: Tokenizer = around.tokenizer
        self._resident = around.resident
        if around.resident is not None:
            self._decoder = around.resident.decoder
        else:
            self._decoder = load_base(config, device, workers.tensor)
        self._adapted = adapt(
            self._decoder,
            config,
            heads=method.heads(),
            dtype=choose_dtype(config.hyperparameters.dtype, device),
        )
        self._lora = self._giving_way(self._adapted.trainable.lora)
        self.data = data
        if not workers.is_in_first_copy:
            workers.begin()  # until then the leader may be taking notes
        if isinstance(method, NotedMethod):
            notes = NoteStore(directory, fingerprint=fingerprint)
            is_asked_together = ranks.group.size > 1 and workers.is_in_first_copy
            self.data = take_notes(
                data,
                method,
                SharedNotes(notes, ranks) if is_asked_together else notes,
                ask=lambda: _asker(around, method, self._decoder, self._adapted, ranks.group),
                at_once=drawn_at_once(around.draw_at_most)
                if method.draws
                else AtOnce(config.hyperparameters.micro_batch),
                ranks=ranks.group.size,
            )
        tallies = TallyStore(directory, fingerprint=fingerprint)
        self._examination = Examination(
            exams=build_exams(around, method, self.data),
            micro_batch=config.hyperparameters.micro_batch,
            store=SharedTallies(tallies, ranks) if ranks.group.size > 1 else tallies,
            stop=self._stop,
            ranks=ranks.group.size,
        )
        self._store = CheckpointStore(
            directory,
            fingerprint=fingerprint,
            base=mark_model(find_checkpoint(config.base_model)),
            generation=config.generation,
            keep=config.checkpoint.keep_last,
        )
        self._checkpoints: CheckpointStore | SharedCheckpoints = self._store
        if ranks.group.size > 1:
            self._checkpoints = SharedCheckpoints(self._store, ranks, self._adapted.trainable)
        self._validation: Validation | None = None
        if config.checkpoint.keep_best and workers.is_in_first_copy:
            self._validation = Validation(
                build_validation(method, self.data),
                self._examination,
                self._checkpoints,
                keep=config.checkpoint.keep_best,
                subject=lambda: self._subject(self._lora),
            )
        self._state = self._restore()
        self.step = self._state.counters.step if self._state else 0
        board.peak(
            peak_tokens_per_second(
                self._decoder,
                dtype=choose_dtype(config.hyperparameters.dtype, device),
                is_frozen=config.adaptation.type != "full",
                # A rank has a part of the weights, so ranks of one copy are as fast as one.
                workers=workers.copies,
            )
        )

    def run(self) -> list[Verdict]:
        """Train to the end and ask the gate; return its verdicts.

        Raises:
            YieldRequested: somebody asked to stop; everything is committed.
        """
        try:
            return self._run()
        finally:
            self._method.close()

    def _run(self) -> list[Verdict]:
        adapted, examination = self._adapted, self._examination
        loop: Loop | None = None
        try:
            # The base comes first: a full fine-tune leaves no base behind to ask later.
            examination.ask_base(self._subject(self._giving_way(None)))
            self._workers.begin()
            loop = self._start_loop()
            loop.take_from_leader()
            self._board.enter("Running")
            adapted.set_training(True)
            loop.run()
            self.step = loop.counters.step
            adapted.set_training(False)
            self._take_best()
            self._board.enter("Evaluating")
            adapted.round_for_publishing()
            candidate = self._subject(self._lora)
            verdicts = examination.ask_candidate(candidate, step=self.step)
        except YieldRequested:
            if loop is None:
                loop = self._start_loop()
            loop.commit()
            log.info("Yielding at step %d.", loop.counters.step)
            raise
        except (RankLostError, RoleLostError):
            # What a step has moved before it was broken off belongs to no step; and a part of the
            # model that is lost is lost.
            if loop is not None and loop.is_whole and self._ranks.group.size == 1:
                loop.commit()
            raise
        loss = examination.loss(step=self.step)
        self._board.evaluated(eval_loss=loss, verdicts=verdicts)
        return verdicts

    def _take_best(self) -> None:
        """Put the weights back that were best on the holdout, where the best are kept."""
        for step in self._validation.best_first() if self._validation else ():
            if (state := self._checkpoints.load(step)) is not None:
                log.info("The best step on the holdout is %d.", step)
                self._adapted.trainable.restore(state.tensors, steps=step)
                self.step = step
                return

    def _validate(self, step: int) -> None:
        """Measure the weights after `step`; as another copy, wait until the first has."""
        if self._validation is not None:
            self._adapted.set_training(False)
            figures = self._validation.measure(step)
            if self._workers.is_leader:
                note_holdout(self._config.checkpoint.directory, step, figures)
            self._adapted.set_training(True)
        self._workers.begin()

    def _giving_way(self, lora: LoraDelta | None) -> LoraDelta | None:
        resident = self._resident
        return lora if resident is None else GivingWay(lora, resident.give_way)

    def _subject(self, lora: LoraDelta | None) -> Subject:
        return Subject(decoder=self._decoder, lora=lora, precision=self._adapted.precision)

    def follow(self) -> None:
        """Train to the end beside the leader.

        Raises:
            YieldRequested: somebody asked one of the workers to stop.
        """
        loop = self._start_loop()
        loop.take_from_leader()
        self._board.enter("Running")
        self._adapted.set_training(True)
        loop.run()

    def write(self, folder: Path) -> None:
        """Write the artifact's files.

        Raises:
            CheckpointDamagedError: the last commit, which alone has all ranks' parts, is damaged.
        """
        weights = self._adapted.trainable.weights()
        if self._ranks.group.size > 1:
            names = {name for name, _ in weights}  # a commit has the method's heads too
            held = self._store.tensors(self.step, WEIGHTS)
            weights = ((name, tensor) for name, tensor in held if name in names)
        self._adapted.write(
            folder, weights, base_model=self._config.base_model, tokenizer=self._tokenizer
        )
        for name, tensors in self._method.files().items():
            save_file(dict(tensors), folder / name, metadata={"format": "pt"})

    def drop(self) -> None:
        """Do nothing: what is not published was never written."""

    def _start_loop(self) -> Loop:
        """Put the restored state back and return the loop that goes on from it."""
        config, state = self._config, self._state
        counters = state.counters if state else Counters()
        if state:
            self._adapted.trainable.restore(state.tensors, steps=counters.step)
        parts = LoopParts(
            decoder=self._decoder,
            trainable=self._adapted.trainable,
            lora=self._lora,
            method=self._method,
            precision=self._adapted.precision,
            order=SampleOrder(self.data, seed=config.hyperparameters.seed),
            ledger=self._ledger(counters.step),
            board=self._board,
            stop=self._stop,
            workers=self._workers,
            validate=self._validate if config.checkpoint.keep_best else None,
        )
        return Loop(
            parts,
            hyper=config.hyperparameters,
            checkpointing=config.checkpoint,
            budget=config.budget,
            counters=counters,
        )

    def _restore(self) -> TrainState | None:
        """Return the state to go on from, of which a copy's other ranks have parts, if any."""
        if not self._workers.is_in_first_copy:
            return None
        if not self._workers.is_leader:
            following = FollowingLedger(self._store, self._ranks)
            return following.restore(self._adapted.trainable)
        restored = self._leading_store().restore()
        if restored is None:
            return None
        self._board.committed(restored[0])
        log.info("Resuming from step %d.", restored[0].step)
        return restored[1]

    def _leading_store(self) -> CheckpointStore | LeadingStore:
        if self._ranks.group.size == 1:
            return self._store
        return LeadingStore(self._store, self._ranks, self._adapted.trainable)

    def _ledger(self, resumed_step: int) -> Ledger:
        if not self._workers.is_in_first_copy:
            return NoLedger()
        if not self._workers.is_leader:
            return FollowingLedger(self._store, self._ranks)
        history = LossHistory(self._config.checkpoint.directory, resumed_step=resumed_step)
        # Ranks of one copy write together, and a replica that lends has other things to do.
        is_alone = self._ranks.group.size == 1 and self._resident is None
        return DiskLedger(self._leading_store(), history, self._board, writes_beside=is_alone)


def _asker(
    around: Surroundings,
    method: NotedMethod,
    decoder: Decoder,
    adapted: Adapted,
    group: RankGroup,
) -> Ask:
    """Return what asks a teacher, or the base: a decoder is it until its state is restored."""
    asked, rules = decoder, around.config.distill
    if isinstance(method, Distill | SequenceDistill) and rules is not None:
        if isinstance(method, Distill) and rules.served is not None:
            served = ServedTeacher(rules.served, around)
            return lambda items, first: method.ask_served(served, items, first=first)
        assert rules.teacher is not None, "there is one of the two"
        dtype = choose_dtype(around.config.hyperparameters.dtype, around.device)
        asked = load_decoder(rules.teacher, dtype=dtype, device=around.device, group=group)

    def ask(items: Sequence[Item], first: int) -> list[torch.Tensor]:
        with adapted.precision():
            return method.ask(asked, items, first=first)

    return ask
