"""The norm of all gradients, of which each rank may hold a part, and its limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.trainable import Trainable


def clip_gradients(trainable: Trainable, group: RankGroup, *, limit: float) -> float:
    """Scale the gradients to at most `limit`, if there is one; return their norm before.

    `group` are the ranks that share one copy of the model. Each gets the same norm, so that the
    weights that all of them hold stay equal.
    """
    if group.size == 1:
        return torch.nn.utils.clip_grad_norm_(trainable.parameters, limit or math.inf).item()
    device = trainable.parameters[0].device
    cut, whole = (_square_sum(trainable.gradients(is_cut=flag), device) for flag in (True, False))
    # What every rank holds whole counts once in the sum over the ranks.
    norm = group.all_reduce(cut + whole / group.size).sqrt()
    torch.nn.utils.clip_grads_with_norm_(trainable.parameters, limit or math.inf, norm)
    return norm.item()


def _square_sum(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.nn.utils.get_total_norm(gradients).to(device).square()
