"""A job on the weights of a replica that serves: no pod, no copy of the model, no time to load it.

It is the same training as in a pod of its own, with the same checkpoints and the same result. Only
the base is lent, so what would need another model, another process or another key is refused.
"""

from __future__ import annotations

from dataclasses import replace

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.errors import RankLostError
from mizzen.runtime.model.arch import find_checkpoint
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.fewer import FewerStore, Limits, agree_on
from mizzen.runtime.train.giving_way import GivingWayRenderer
from mizzen.runtime.train.halving import FewerAtOnce
from mizzen.runtime.train.job import conclude, fingerprint, read_data
from mizzen.runtime.train.loan_memory import fit_loan
from mizzen.runtime.train.methods.registry import build_method
from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.stop import StopFlag, YieldRequested
from mizzen.runtime.train.surroundings import Resident, Surroundings
from mizzen.runtime.train.together import SharedStop, Together
from mizzen.runtime.train.training import Training
from mizzen.runtime.train.workers import Workers


def run_loan(
    config: TrainConfig,
    resident: Resident,
    *,
    board: ProgressBoard,
    stop: StopFlag,
    workers: Workers,
) -> None:
    """Train, ask the gate and publish; `workers` are the replica's ranks.

    Raises:
        YieldRequested: somebody asked to stop, and the last whole step is committed; or a rank
            ran out of memory, and the next generation runs fewer samples at once.
        LoanDoesNotFitError: its steps are more than the replica has left.
        MizzenError: the job cannot go on; the message says what to change.
    """
    decoder = resident.decoder
    ranks = Together(workers.tensor, decoder.place.device)
    around = Surroundings(
        config=config,
        spec=decoder.spec,
        tokenizer=Tokenizer.load(find_checkpoint(config.base_model)),
        device=decoder.place.device,
        stop=SharedStop(stop, ranks) if workers.tensor.size > 1 else stop,
        workers=workers,
        resident=resident,
    )
    method = build_method(around)

    def look_up() -> None:
        resident.give_way()
        stop.check()  # nothing is computed together yet

    renderer = GivingWayRenderer(around.tokenizer, look_up)
    data = read_data(config, renderer, board, method.shape, decoder.spec.max_len, pod=None)
    mark = fingerprint(config, data)
    notes = FewerStore(config.checkpoint.directory, ranks=workers.tensor.size)
    limits = Limits(micro_batch=fit_loan(config, resident, method, data, ranks))
    limits = agree_on(limits, notes, workers, decoder.place.device)
    around = replace(around, config=limits.applied_to(config), draw_at_most=limits.drawn)
    work = Training(around, method, data, fingerprint=mark, board=board, workers=workers)
    try:
        verdicts = work.run()
    except FewerAtOnce as fewer:
        # The other ranks find this one gone.
        notes.note(workers.tensor.rank, limits, fewer)
        raise YieldRequested from fewer
    except RankLostError as error:
        if notes.least(limits) == limits:
            raise
        raise YieldRequested from error  # the other one ran out of memory
    if workers.is_leader:
        conclude(config, work, verdicts, board)
