"""Tokens that a step lacks because the one before it, which samples them, has not landed."""

import torch
from torch import Tensor

from mizzen.runtime.engine.batch import StepInput


def fill_unknown(token_ids_T: Tensor, step: StepInput, before_N: Tensor | None) -> None:
    """Write the tokens that the step before has sampled to the places that wait for them.

    On a GPU nothing waits: the copy follows the sampling in the same stream.
    """
    if before_N is None or not len(step.unknown_at_M):
        return
    at_M, rows_M = (
        torch.from_numpy(indices).to(token_ids_T.device, non_blocking=True)
        for indices in (step.unknown_at_M, step.sampled_at_M)
    )
    token_ids_T.index_copy_(0, at_M, before_N.index_select(0, rows_M))
