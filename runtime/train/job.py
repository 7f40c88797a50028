"""One generation of one job, from its files to its artifact.

Every stage may be the last: what a stage finished is on disk, so the next generation passes over
it and goes on with the first unfinished one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import ArchSpec, find_checkpoint
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.adaptation import Adapted, adapt
from mizzen.runtime.train.admin import AdminServer
from mizzen.runtime.train.batches import SampleOrder
from mizzen.runtime.train.checkpoint import CheckpointStore, Counters, TrainState
from mizzen.runtime.train.config import Processing, TrainConfig, TrainerEnvironment
from mizzen.runtime.train.data import Prepared, prepare
from mizzen.runtime.train.device import choose_device, choose_dtype, use_own_cpus
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.evaluate import Examination, TallyStore, decide_verdict
from mizzen.runtime.train.history import LossHistory
from mizzen.runtime.train.loop import Loop, LoopParts
from mizzen.runtime.train.methods.method import Method
from mizzen.runtime.train.methods.registry import build_method
from mizzen.runtime.train.notes import Ask, NoteStore, take_notes
from mizzen.runtime.train.progress import ProgressBoard, Verdict, fit_termination_log
from mizzen.runtime.train.publish import publish
from mizzen.runtime.train.samples import Item
from mizzen.runtime.train.sources import load_source
from mizzen.runtime.train.stop import EXIT_DONE, EXIT_YIELDED, StopFlag, YieldRequested
from mizzen.runtime.train.surroundings import Surroundings
from mizzen.runtime.train.watchdog import watch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A job that is ready to train: its data, its model and where its state is kept."""

    config: TrainConfig
    method: Method
    data: Prepared
    tokenizer: Tokenizer
    decoder: Decoder
    adapted: Adapted
    store: CheckpointStore
    state: TrainState | None  # as restored; None on a first start
    tallies: TallyStore
    board: ProgressBoard
    stop: StopFlag


def run_job(config: TrainConfig, environment: TrainerEnvironment, stop: StopFlag) -> int:
    """Run a job until it is done or has yielded; return the exit code.

    Raises:
        MizzenError: the job cannot go on; the message says what to change.
    """
    if config.world_size > 1:
        raise JobConfigError("world_size above 1 is not supported. Set it to 1.")
    log.info("Computing with %d threads.", use_own_cpus())
    board = ProgressBoard(generation=config.generation)
    AdminServer(board, stop, token_file=environment.admin_token_file).start(config.admin_port)
    with stop.nothing_to_lose():
        stage = _prepare(config, environment, board, stop)
    watch(stop, timeout_s=config.failure.hang_timeout_s)
    try:
        verdicts, step = _train_and_evaluate(stage)
    except YieldRequested:
        _report(environment.termination_log, board)
        return EXIT_YIELDED
    if all(verdict.passed for verdict in verdicts):
        board.enter("Publishing")
        with stop.nothing_to_lose():
            board.published(publish(config, _artifact_writer(stage), step=step, verdicts=verdicts))
    else:
        log.warning("The candidate failed its evaluation; nothing is published.")
    board.enter("Succeeded")
    _report(environment.termination_log, board)
    return EXIT_DONE


def _prepare(
    config: TrainConfig, environment: TrainerEnvironment, board: ProgressBoard, stop: StopFlag
) -> Stage:
    checkpoint = find_checkpoint(config.base_model)
    tokenizer, spec = Tokenizer.load(checkpoint), ArchSpec.from_dir(checkpoint)
    device = choose_device(environment.device)
    around = Surroundings(config=config, spec=spec, tokenizer=tokenizer, device=device, stop=stop)
    method = build_method(around)
    sources = [
        load_source(dataset, default_format=config.processing.format, shape=method.shape)
        for dataset in config.datasets
    ]
    data = prepare(sources, tokenizer, _within_context(config, spec))
    board.prepared(
        samples=data.samples,
        holdout=len(data.holdout),
        truncated=data.truncated,
        dropped=data.dropped,
    )
    decoder = load_decoder(config.base_model, dtype=_load_dtype(config, device), device=device)
    dtype = choose_dtype(config.hyperparameters.dtype, device)
    adapted = adapt(decoder, config, heads=method.heads(), dtype=dtype)
    directory, mark = config.checkpoint.directory, fingerprint(config, data)
    if method.asks != "nobody":
        data = take_notes(
            data,
            method,
            NoteStore(directory, fingerprint=mark),
            ask=lambda: _asker(method, decoder, adapted),
            at_once=config.hyperparameters.micro_batch,
        )
    store = CheckpointStore(
        directory,
        fingerprint=mark,
        generation=config.generation,
        keep=config.checkpoint.keep_last,
    )
    restored = store.restore()
    if restored:
        board.committed(restored[0])
        log.info("Resuming from step %d.", restored[0].step)
    return Stage(
        config=config,
        method=method,
        data=data,
        tokenizer=tokenizer,
        decoder=decoder,
        adapted=adapted,
        store=store,
        state=restored[1] if restored else None,
        tallies=TallyStore(directory, fingerprint=mark),
        board=board,
        stop=stop,
    )


def _asker(method: Method, decoder: Decoder, adapted: Adapted) -> Ask:
    """Return what asks the base, which is what a decoder is until its state is restored."""

    def ask(items: Sequence[Item], first: int) -> list[torch.Tensor]:
        with adapted.precision():
            return method.ask(decoder, items, first=first)

    return ask


def _train_and_evaluate(stage: Stage) -> tuple[list[Verdict], int]:
    """Train to the end and ask the gate; return its verdicts and the last step."""
    adapted, suites = stage.adapted, stage.config.evaluation.suites
    examination = Examination(
        decoder=stage.decoder,
        method=stage.method,
        precision=adapted.precision,
        holdout=stage.data.holdout,
        micro_batch=stage.config.hyperparameters.micro_batch,
        store=stage.tallies,
        stop=stage.stop,
    )
    loop: Loop | None = None
    try:
        # The base comes first: a full fine-tune leaves no base behind to ask later.
        base = examination.tally("base", None) if suites else None
        loop = _start_loop(stage)
        stage.board.enter("Running")
        adapted.set_training(True)
        loop.run()
        adapted.set_training(False)
        stage.board.enter("Evaluating")
        adapted.round_for_publishing()
        if base is None:
            return [], loop.counters.step
        candidate = examination.tally("candidate", adapted.trainable.lora)
    except YieldRequested:
        if loop is None:
            loop = _start_loop(stage)
        loop.commit()
        log.info("Yielding at step %d.", loop.counters.step)
        raise
    verdicts = [decide_verdict(suite, base=base, candidate=candidate) for suite in suites]
    is_loss = not stage.method.measure.is_higher_better
    stage.board.evaluated(eval_loss=candidate.mean if is_loss else None, verdicts=verdicts)
    return verdicts, loop.counters.step


def _start_loop(stage: Stage) -> Loop:
    """Put the restored state back and return the loop that goes on from it."""
    config, state = stage.config, stage.state
    counters = state.counters if state else Counters()
    if state:
        stage.adapted.trainable.restore(state.tensors, steps=counters.step)
    parts = LoopParts(
        decoder=stage.decoder,
        trainable=stage.adapted.trainable,
        method=stage.method,
        precision=stage.adapted.precision,
        order=SampleOrder(stage.data, seed=config.hyperparameters.seed),
        store=stage.store,
        history=LossHistory(config.checkpoint.directory, resumed_step=counters.step),
        board=stage.board,
        stop=stage.stop,
    )
    return Loop(
        parts,
        hyper=config.hyperparameters,
        checkpointing=config.checkpoint,
        counters=counters,
    )


def _artifact_writer(stage: Stage) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        stage.adapted.write(folder, base_model=stage.config.base_model, tokenizer=stage.tokenizer)
        for name, tensors in stage.method.files().items():
            save_file(dict(tensors), folder / name, metadata={"format": "pt"})

    return write


def fingerprint(config: TrainConfig, data: Prepared) -> str:
    """Return what a checkpoint must agree with: all that makes a step's outcome differ.

    How many samples run at once is left out on purpose: it may change when memory is short.
    """
    document = config.model_dump(
        mode="json", include={"method", "adaptation", "base_model", "processing", config.method}
    )
    document["hyperparameters"] = config.hyperparameters.model_dump(exclude={"micro_batch"})
    document["weights"] = data.weights
    document["data"] = data.digest
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _within_context(config: TrainConfig, spec: ArchSpec) -> Processing:
    """Return the rules for data, with no sample longer than the model can read."""
    rules = config.processing
    return rules.model_copy(update={"max_seq_len": min(rules.max_seq_len, spec.max_len)})


def _load_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the type the base weights are kept in; weights that move are always float32."""
    if config.adaptation.type == "full":
        return torch.float32
    return choose_dtype(config.hyperparameters.dtype, device)


def _report(termination_log: Path, board: ProgressBoard) -> None:
    """Leave the last word where the operator finds it after the process is gone."""
    text = fit_termination_log(board.document())
    log.info("Last words: %s", text)
    try:
        termination_log.write_text(text)
    except OSError:
        log.info("%s is not writable; outside a pod that is normal.", termination_log)
