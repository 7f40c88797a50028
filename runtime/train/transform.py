"""A job that computes its result from weights that are there: merge, quantize, prune.

There are no steps to count and nothing to resume but the gate's tallies. The gate asks the very
files that will be published, as a runtime would read them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.compress.candidate import Candidate
from mizzen.runtime.train.compress.merge import merge
from mizzen.runtime.train.compress.prune import prune
from mizzen.runtime.train.compress.quantize import quantize
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.durable import storage_faults_of
from mizzen.runtime.train.evaluate import Examination, Tally, TallyStore, decide_verdict
from mizzen.runtime.train.export import write_model
from mizzen.runtime.train.methods.sft import Sft
from mizzen.runtime.train.progress import ProgressBoard, Verdict
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.stop import StopFlag


@dataclass(slots=True, kw_only=True)
class Transform:
    """A job that is ready to compute."""

    config: TrainConfig
    data: Prepared | None  # None: nothing to calibrate with and no gate
    tokenizer: Tokenizer
    device: torch.device
    tallies: TallyStore
    board: ProgressBoard
    stop: StopFlag
    step: int = 0

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
        suites = self.config.evaluation.suites
        base = self._tally("base", self.config.base_model) if suites else None
        self.board.enter("Running")
        with self.stop.nothing_to_lose():
            self._write_candidate()
        if base is None:
            return []
        self.board.enter("Evaluating")
        candidate = self._tally("candidate", self.folder)
        verdicts = [decide_verdict(suite, base=base, candidate=candidate) for suite in suites]
        self.board.evaluated(eval_loss=candidate.mean, verdicts=verdicts)
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
                    tokenizer=self.tokenizer,
                )
            else:
                candidate.write(self.folder, base_model=config.base_model, tokenizer=self.tokenizer)

    def _tally(self, who: str, model: Path) -> Tally:
        assert self.data is not None, "suites need data, as the job's configuration checks"
        with self.stop.nothing_to_lose():
            decoder = load_decoder(model, device=self.device)
        examination = Examination(
            decoder=decoder,
            method=Sft(),
            holdout=self.data.holdout,
            micro_batch=self.config.hyperparameters.micro_batch,
            store=self.tallies,
            stop=self.stop,
        )
        return examination.tally(who, None)


def _compute(config: TrainConfig, decoder: Decoder, samples: list[Sample]) -> Candidate | None:
    """Return what becomes of the model; None where the decoder's own weights are the result."""
    if config.method == "quantize" and config.quantize is not None:
        return quantize(decoder, config.quantize, samples)
    if config.method == "prune" and config.prune is not None:
        return prune(decoder, config.prune, samples)
    assert config.merge is not None, "checked by the job's configuration"
    merge(decoder, config.merge)
    return None
