"""Does a job fit, before a sample is read? What a model's training holds on to, against the limit.

Activations are left out: they follow from the samples, and too many at once are halved later on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mizzen.runtime.train.errors import TrainingDoesNotFitError

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MOMENTS = 2  # of Adam, each in the type of the weight it belongs to


@dataclass(frozen=True, slots=True)
class Need:
    """What is in memory for as long as a job trains, in bytes."""

    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments


def need_of(weights: Iterable[Tensor], moving: Iterable[Tensor]) -> Need:
    """Return what weights need of which some move; those may be among the others or beside them."""
    moving = list(moving)
    held = {id(tensor): tensor.nbytes for tensor in (*weights, *moving)}
    gradients = sum(tensor.nbytes for tensor in moving)
    return Need(sum(held.values()), gradients, _MOMENTS * gradients)


def check_fits(need: Need, limit_bytes: int) -> None:
    """Refuse a job that could never make its first step.

    Raises:
        TrainingDoesNotFitError: it needs more than there is.
    """
    if need.total > limit_bytes:
        raise TrainingDoesNotFitError(
            weights_mib=_mib(need.weights),
            gradients_mib=_mib(need.gradients),
            moments_mib=_mib(need.moments),
            limit_mib=limit_bytes >> 20,
        )


def memory_limit(device: torch.device, cgroup_limit: Path = _CGROUP_LIMIT) -> int:
    """Return the bytes of the GPU, or those this pod may use of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = cgroup_limit.read_text().strip()
        return host if text == "max" else min(host, int(text))
    except (OSError, ValueError):
        return host  # no cgroup v2


def _mib(count: int) -> int:
    return -(-count // 2**20)
