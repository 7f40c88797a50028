"""A job that computes its result from weights that are there: merge, quantize, prune.

There are no steps to count and nothing to resume but the gate's tallies. The gate asks the very
files that will be published, as a runtime would read them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.compress.candidate import Candidate
from mizzen.runtime.train.compress.merge import merge
from mizzen.runtime.train.compress.prune import prune
from mizzen.runtime.train.compress.quantize import quantize, warn_of_readers
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.durable import storage_faults_of
from mizzen.runtime.train.evaluate import Examination, TallyStore
from mizzen.runtime.train.export import write_model
from mizzen.runtime.train.methods.sft import Sft
from mizzen.runtime.train.progress import ProgressBoard, Verdict
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.stop import StopFlag
from mizzen.runtime.train.suites.build import build_exams
from mizzen.runtime.train.suites.exam import Subject
from mizzen.runtime.train.surroundings import Surroundings


@dataclass(slots=True, kw_only=True)
class Transform:
    """A job that is ready to compute."""

    around: Surroundings
    data: Prepared | None  # None: nothing to calibrate with and no gate
    tallies: TallyStore
    board: ProgressBoard
    stop: StopFlag
    step: int = 0

    @property
    def config(self) -> TrainConfig:
        """The job."""
        return self.around.config

    @property
    def folder(self) -> Path:
        """Where the candidate lies until it is published or refused."""
        return self.config.output.directory / f".candidate-{self.config.job.replace('/', '-')}"

    def run(self) -> list[Verdict]:
        """Compute the candidate and ask the gate; return its verdicts.

        Raises:
            YieldRequested: somebody asked to stop while the gate was counting.
            JobConfigError: the model cannot be changed in this way.
        """
        examination = self._examination()
        if examination is not None:
            examination.ask_base(self._subject(self.config.base_model))
        self.board.enter("Running")
        with self.stop.nothing_to_lose():
            self._write_candidate()
        if examination is None:
            return []
        self.board.enter("Evaluating")
        verdicts = examination.ask_candidate(self._subject(self.folder), step=self.step)
        loss = examination.loss(step=self.step)
        self.board.evaluated(eval_loss=loss, verdicts=verdicts)
        return verdicts

    def write(self, folder: Path) -> None:
        """Move the candidate's files into the artifact's folder."""
        for path in sorted(self.folder.iterdir()):
            path.rename(folder / path.name)
        self.folder.rmdir()

    def drop(self) -> None:
        """Remove a candidate that is not published."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_candidate(self) -> None:
        config = self.config
        decoder = load_decoder(config.base_model, dtype=torch.float32)
        samples = [i for part in self.data.train for i in part] if self.data else []
        kept = [item for item in samples if isinstance(item, Sample)]
        with storage_faults_of("The candidate", config.output.directory):
            self.drop()
            self.folder.mkdir(parents=True)
            candidate = _compute(config, decoder, kept)
            if candidate is None:
                weights = ((shard.name, shard.tensor.detach()) for shard in decoder.shards())
                write_model(
                    self.folder,
                    weights,
                    spec=decoder.spec,
                    base_model=config.base_model,
                    tokenizer=self.around.tokenizer,
                )
            else:
                candidate.write(
                    self.folder, base_model=config.base_model, tokenizer=self.around.tokenizer
                )

    def _examination(self) -> Examination | None:
        """Return the gate, None where there is none."""
        if not self.config.evaluation.suites:
            return None
        assert self.data is not None, "suites need data, as the job's configuration checks"
        return Examination(
            exams=build_exams(self.around, Sft(), self.data),
            micro_batch=self.config.hyperparameters.micro_batch,
            store=self.tallies,
            stop=self.stop,
        )

    def _subject(self, model: Path) -> Subject:
        with self.stop.nothing_to_lose():
            return Subject(decoder=load_decoder(model, device=self.around.device))


def _compute(config: TrainConfig, decoder: Decoder, samples: list[Sample]) -> Candidate | None:
    """Return what becomes of the model; None where the decoder's own weights are the result."""
    if config.method == "quantize" and config.quantize is not None:
        warn_of_readers(decoder.spec.family)
        return quantize(decoder, config.quantize, samples)
    if config.method == "prune" and config.prune is not None:
        return prune(decoder, config.prune, samples)
    assert config.merge is not None, "checked by the job's configuration"
    merge(decoder, config.merge)
    return None
