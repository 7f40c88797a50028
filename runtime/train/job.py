"""One generation of one job, from its files to its artifact.

Every stage may be the last: what a stage finished is on disk, so the next generation passes over
it and goes on with the first unfinished one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.errors import UnknownArchitectureError
from mizzen.runtime.handover import wait_for_memory
from mizzen.runtime.model.arch import ArchSpec, find_checkpoint
from mizzen.runtime.parallel.nodes import read_secret
from mizzen.runtime.train.admin import AdminServer
from mizzen.runtime.train.card import Provenance
from mizzen.runtime.train.config import TrainConfig, TrainerEnvironment
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.device import choose_device, use_own_cpus
from mizzen.runtime.train.digest import mark_weights, model_digest
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.evaluate import TallyStore
from mizzen.runtime.train.fewer import FewerStore, Limits, agree_on
from mizzen.runtime.train.halving import FewerAtOnce
from mizzen.runtime.train.hugging_face.installed import check_installed
from mizzen.runtime.train.memory import check_fits, check_memory, memory_limit
from mizzen.runtime.train.methods.registry import build_method
from mizzen.runtime.train.preparing import Pod, prepare_data
from mizzen.runtime.train.progress import ProgressBoard, Verdict, fit_termination_log
from mizzen.runtime.train.publish import publish
from mizzen.runtime.train.records import Shape
from mizzen.runtime.train.render import ChatRenderer
from mizzen.runtime.train.roles.cast import close_stage, open_stage
from mizzen.runtime.train.roles.choice import settle_roles
from mizzen.runtime.train.stop import EXIT_DONE, EXIT_YIELDED, StopFlag, YieldRequested
from mizzen.runtime.train.surroundings import Stage, Surroundings
from mizzen.runtime.train.teacher import check_same_tokens
from mizzen.runtime.train.together import SharedStop, Together
from mizzen.runtime.train.training import Training
from mizzen.runtime.train.transform import Transform
from mizzen.runtime.train.watchdog import watch
from mizzen.runtime.train.workers import Workers, meet

log = logging.getLogger(__name__)


class Work(Protocol):
    """A job with its data read and its model found."""

    step: int
    data: Prepared | None

    def run(self) -> list[Verdict]:
        """Make the candidate and ask the gate; raises YieldRequested with all committed."""
        ...

    def write(self, folder: Path) -> None:
        """Write the artifact's files."""
        ...

    def drop(self) -> None:
        """Forget a candidate that failed."""
        ...


def run_job(config: TrainConfig, environment: TrainerEnvironment, stop: StopFlag) -> int:
    """Run a job until it is done or has yielded; return the exit code.

    Raises:
        MizzenError: the job cannot go on; the message says what to change.
    """
    log.info("Computing with %d threads.", use_own_cpus())
    board = ProgressBoard(generation=config.generation)
    AdminServer(board, stop, token_file=environment.admin_token_file).start(config.admin_port)
    with stop.nothing_to_lose():
        config = settle_roles(config, choose_device(environment.device))
        workers = meet(config, environment, choose_device(environment.device), stop)
        stage = open_stage(config, environment, workers, stop)
    if stage is not None and not workers.is_leader:
        board.enter("Running")
        workers.wait_for_end()
        return EXIT_YIELDED if stop.is_asked else EXIT_DONE
    limits = Limits(micro_batch=config.hyperparameters.micro_batch)
    if (ranks := config.parallelism.tensor) == 1:
        return _run_work(config, environment, board, stop, workers, stage, limits)
    notes = FewerStore(config.checkpoint.directory, ranks=ranks)
    with stop.nothing_to_lose():
        limits = agree_on(limits, notes, workers, choose_device(environment.device))
    config = limits.applied_to(config)
    try:
        return _run_work(config, environment, board, stop, workers, stage, limits)
    except FewerAtOnce as fewer:
        notes.note(environment.node_rank, limits, fewer)
        # Without a word to the others: they take it for lost, in whatever they wait.
        _report(environment.termination_log, board)
        return EXIT_YIELDED


def _run_work(
    config: TrainConfig,
    environment: TrainerEnvironment,
    board: ProgressBoard,
    stop: StopFlag,
    workers: Workers,
    stage: Stage | None,
    limits: Limits,
) -> int:
    with stop.nothing_to_lose():
        wait_for_memory(choose_device(environment.device))
        work = _prepare(config, environment, board, stop, workers, stage, limits)
    watch(stop, timeout_s=config.failure.hang_timeout_s)
    try:
        if isinstance(work, Training) and not workers.is_in_first_copy:
            work.follow()
            workers.end()
            return EXIT_DONE
        verdicts = work.run()
        if not workers.is_leader:
            workers.end()
            return EXIT_DONE
    except YieldRequested:
        workers.end()
        _report(environment.termination_log, board)
        return EXIT_YIELDED
    close_stage(stage)
    workers.end()
    with stop.nothing_to_lose():
        conclude(config, work, verdicts, board)
    _report(environment.termination_log, board)
    return EXIT_DONE


def conclude(
    config: TrainConfig, work: Work, verdicts: list[Verdict], board: ProgressBoard
) -> None:
    """Publish what a job made, unless the gate is against it."""
    failed = [verdict.suite for verdict in verdicts if not verdict.passed]
    if failed:
        log.warning("The candidate is worse than its base on %s.", ", ".join(failed))
    if not failed or config.evaluation.on_fail == "Warn":
        board.enter("Publishing")
        made_from = Provenance(
            base_digest=model_digest(find_checkpoint(config.base_model)),
            base_weights=mark_weights(config.base_model),
            data_digest=work.data.digest if work.data else None,
            counts=work.data.counts if work.data else {},
        )
        board.published(
            publish(config, work.write, step=work.step, verdicts=verdicts, made_from=made_from)
        )
    else:
        work.drop()
    board.enter("Succeeded")


def _prepare(
    config: TrainConfig,
    environment: TrainerEnvironment,
    board: ProgressBoard,
    stop: StopFlag,
    workers: Workers,
    stage: Stage | None,
    limits: Limits,
) -> Work:
    if config.backend == "Transformers":
        return prepare_transformers(config, environment, board, stop)
    pod = Pod(stop, stage)
    around = _surround(config, environment, stop, stage)
    check_memory(around)
    around = replace(around, workers=workers, draw_at_most=limits.drawn)
    if workers.tensor.size > 1:
        around = replace(around, stop=SharedStop(stop, Together(workers.tensor, around.device)))
    if config.distill is not None and config.distill.teacher is not None:
        check_same_tokens(around.tokenizer, config.distill.teacher)
    if config.is_trained:
        method = build_method(around)
        data = read_data(
            config, around.tokenizer, board, method.shape, around.spec.max_len, pod=pod
        )
        mark = fingerprint(config, data)
        return Training(around, method, data, fingerprint=mark, board=board, workers=workers)
    read = None
    if config.datasets:
        longest = around.spec.max_len
        read = read_data(config, around.tokenizer, board, "conversation", longest, pod=pod)
    directory = config.checkpoint.directory
    return Transform(
        around=around,
        data=read,
        tallies=TallyStore(directory, fingerprint=fingerprint(config, read)),
        board=board,
        stop=stop,
    )


def _surround(
    config: TrainConfig, environment: TrainerEnvironment, stop: StopFlag, stage: Stage | None
) -> Surroundings:
    checkpoint = find_checkpoint(config.base_model)
    return Surroundings(
        config=config,
        spec=_architecture(checkpoint),
        tokenizer=Tokenizer.load(checkpoint),
        device=choose_device(environment.device),
        stop=stop,
        judge_api_key=environment.judge_api_key,
        teacher_api_key=environment.teacher_api_key,
        admin_token=_admin_token(config, environment),
        stage=stage,
    )


def _admin_token(config: TrainConfig, environment: TrainerEnvironment) -> str | None:
    """Return what proves to replicas that the policy may come from here; outside a pod nothing."""
    path = environment.admin_token_file
    if config.rl is None or config.rl.rollout is None or not path.exists():
        return None
    return read_secret(path).decode()


def _architecture(checkpoint: Path) -> ArchSpec:
    try:
        return ArchSpec.from_dir(checkpoint)
    except UnknownArchitectureError as error:
        raise UnknownArchitectureError(
            f"{error} spec.backend Transformers may know it, for method sft."
        ) from error


def prepare_transformers(
    config: TrainConfig, environment: TrainerEnvironment, board: ProgressBoard, stop: StopFlag
) -> Work:
    """Return a job of backend Transformers, ready to train.

    Raises:
        MizzenError: it cannot be trained so; the message says what to change.
    """
    check_installed()
    # Many seconds of imports that no other job needs.
    from mizzen.runtime.train.hugging_face import model  # noqa: PLC0415
    from mizzen.runtime.train.hugging_face.training import HuggingFaceTraining  # noqa: PLC0415

    checkpoint, device = find_checkpoint(config.base_model), choose_device(environment.device)
    described = model.read_config(checkpoint)
    check_fits(model.plan_need(config, described, device), memory_limit(device))
    tokenizer = Tokenizer.load(checkpoint)
    longest = model.max_len(described)
    data = read_data(config, tokenizer, board, "conversation", longest, pod=Pod(stop))
    around = None
    if questions := [suite.name for suite in config.evaluation.suites if suite.is_question]:
        try:
            around = _surround(config, environment, stop, stage=None)
        except UnknownArchitectureError as error:
            raise JobConfigError(
                f"evaluation.suites {', '.join(questions)} are asked by Mizzen's decoder, and it "
                "does not know this model. Use type perplexity."
            ) from error
    mark = fingerprint(config, data)
    return HuggingFaceTraining(
        config, data, around, device=device, fingerprint=mark, board=board, stop=stop
    )


def read_data(
    config: TrainConfig,
    renderer: ChatRenderer,
    board: ProgressBoard,
    shape: Shape,
    max_len: int | None,
    *,
    pod: Pod | None,
) -> Prepared:
    """Read what the job learns from, with no sample longer than the model can read."""
    wanted = config.processing.max_seq_len
    limits = {"max_seq_len": min(wanted, max_len or wanted)}
    rules = config.processing.model_copy(update=limits)
    data = prepare_data(config.datasets, renderer, rules, shape, pod=pod)
    board.prepared(data.counts)
    return data


def fingerprint(config: TrainConfig, data: Prepared | None) -> str:
    """Return what a checkpoint must agree with: all that makes a step's outcome differ.

    How many samples run at once is left out on purpose: it may change when memory is short.
    """
    sections = {"method", "adaptation", "base_model", "processing", config.section}
    document = config.model_dump(mode="json", include=sections)
    if config.adaptation.type != "qlora":
        # Says nothing then, and checkpoints of versions that did not know it stay valid.
        del document["adaptation"]["quantization"]
    if config.backend != "Mizzen":
        document["backend"] = config.backend
    # Where answers are drawn may change; and checkpoints of versions that knew of one place only.
    (document.get("rl") or {}).pop("rollout", None)
    # The data is the same by whichever way it was prepared.
    del document["processing"]["engine"]
    # Nor what says nothing: checkpoints of versions that did not know it stay valid.
    if config.distill is not None and not config.distill.teacher_answers:
        (document.get("distill") or {}).pop("teacher_answers", None)
    document["hyperparameters"] = config.hyperparameters.model_dump(exclude={"micro_batch"})
    document["weights"] = data.weights if data else []
    document["data"] = data.digest if data else ""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _report(termination_log: Path, board: ProgressBoard) -> None:
    """Leave the last word where the operator finds it after the process is gone."""
    text = fit_termination_log(board.document())
    log.info("Last words: %s", text)
    try:
        termination_log.write_text(text)
    except OSError:
        log.info("%s is not writable; outside a pod that is normal.", termination_log)
