"""A job on the weights of a replica that serves: no pod, no copy of the model, no time to load it.

It is the same training as in a pod of its own, with the same checkpoints and the same result. Only
the base is lent, so what would need another model, another process or another key is refused.
"""

from __future__ import annotations

from dataclasses import replace

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import find_checkpoint
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.giving_way import GivingWayRenderer
from mizzen.runtime.train.job import conclude, fingerprint, read_data
from mizzen.runtime.train.loan_memory import fit_loan
from mizzen.runtime.train.methods.registry import build_method
from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.stop import StopFlag
from mizzen.runtime.train.surroundings import Resident, Surroundings
from mizzen.runtime.train.training import Training
from mizzen.runtime.train.workers import Workers


def run_loan(
    config: TrainConfig, resident: Resident, *, board: ProgressBoard, stop: StopFlag
) -> None:
    """Train, ask the gate and publish.

    Raises:
        YieldRequested: somebody asked to stop; the last whole step is committed.
        LoanDoesNotFitError: its steps are more than the replica has left.
        MizzenError: the job cannot go on; the message says what to change.
    """
    decoder = resident.decoder
    around = Surroundings(
        config=config,
        spec=decoder.spec,
        tokenizer=Tokenizer.load(find_checkpoint(config.base_model)),
        device=decoder.place.device,
        stop=stop,
        resident=resident,
    )
    method = build_method(around)
    renderer = GivingWayRenderer(around.tokenizer, resident.give_way)
    data = read_data(config, renderer, board, method.shape, decoder.spec.max_len, pod=None)
    mark = fingerprint(config, data)
    around = replace(around, config=_running(config, fit_loan(config, resident, method, data)))
    work = Training(around, method, data, fingerprint=mark, board=board, workers=Workers())
    verdicts = work.run()
    conclude(config, work, verdicts, board)


def _running(config: TrainConfig, at_once: int) -> TrainConfig:
    """Return the same job with so many samples at once, which no checkpoint minds."""
    hyper = config.hyperparameters.model_copy(update={"micro_batch": at_once})
    return config.model_copy(update={"hyperparameters": hyper})
