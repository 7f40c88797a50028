"""Does a job fit, before anything is read? What it holds on to, against the limit.

Activations are left out: they follow from the samples, and too many at once are halved later on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mizzen.runtime.model.arch import ArchSpec, find_checkpoint
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import Placement
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.adaptation import adapt, check_groups, frozen_bits, load_dtype
from mizzen.runtime.train.compress.need import ComputingNeed, plan_computing
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.device import choose_dtype
from mizzen.runtime.train.errors import ComputingDoesNotFitError, TrainingDoesNotFitError
from mizzen.runtime.train.rewards import is_reward_adapter
from mizzen.runtime.train.roles.actors import (
    ReferenceRole,
    RewardRole,
    RolloutRole,
    choose_device_of,
)
from mizzen.runtime.train.surroundings import Surroundings

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


def check_memory(around: Surroundings) -> None:
    """Refuse a job that could never make its first step, before it reads or allocates anything.

    A method's own head is left out, as it is one row, and so is a reward model's adapter.

    Raises:
        TrainingDoesNotFitError, ComputingDoesNotFitError: it needs more than there is.
        JobConfigError: the base model cannot be trained or changed in the way the job asks for,
            or its reward model is none.
        BadModelError: its shapes cannot be spread over the ranks, or stored in so few bits.
    """
    config, spec = around.config, around.spec
    if config.is_trained:
        check_fits(plan_need(config, spec, around.device), memory_limit(around.device))
    else:
        limit = memory_limit(torch.device("cpu"))
        check_computing_fits(config.method, plan_computing(config, spec), limit)


def plan_need(config: TrainConfig, spec: ArchSpec, device: torch.device) -> Need:
    """Return what a job needs on a device, from the shapes of its models alone."""
    check_groups(config, spec)
    # Where ranks do not share evenly, the last one has most.
    ranks = config.parallelism.tensor
    last = RankGroup(ranks - 1, ranks)
    place = Placement(load_dtype(config, device), torch.device("meta"), last)
    decoder = _base(config, spec, place)
    adapted = adapt(decoder, config, heads=(), dtype=place.dtype)
    held = [decoder, *_asked_at_each_step(config, decoder, device)]
    weights = [tensor for one in held for tensor in (*one.parameters(), *one.buffers())]
    return need_of(weights, adapted.trainable.parameters)


def _asked_at_each_step(
    config: TrainConfig, decoder: Decoder, device: torch.device
) -> Iterator[Decoder]:
    """Return the models that stay beside the one that learns, without their weights."""
    place = decoder.place
    for _ in range(_copies(config, device)):
        yield _base(config, decoder.spec, place)
    yield from _reward_model(config, decoder, device)
    rules = config.distill
    if config.method == "distill" and rules is not None and rules.on_policy and rules.teacher:
        spec = ArchSpec.from_dir(find_checkpoint(rules.teacher))
        dtype = choose_dtype(config.hyperparameters.dtype, device)
        yield Decoder(spec, replace(place, dtype=dtype))


def _copies(config: TrainConfig, device: torch.device) -> int:
    """Return how many more bases there are for rl, beside the trainer's own, in the same memory."""
    if config.section != "rl":
        return 0
    if config.roles == "InProcess":
        return int(config.adaptation.type == "full")  # the reference: an adapter's is its own base
    return sum(_is_here(role, config, device) for role in (RolloutRole, ReferenceRole))


def _reward_model(config: TrainConfig, decoder: Decoder, device: torch.device) -> Iterator[Decoder]:
    """Return what judges answers in the same memory, where that is not the reference."""
    path = config.rl.reward_model if config.section == "rl" and config.rl else None
    if path is None:
        return
    is_adapter = is_reward_adapter(path, config.base_model)
    if not _is_here(RewardRole, config, device):
        return
    if not is_adapter:
        yield Decoder(ArchSpec.from_dir(path), decoder.place)
    elif config.roles == "Ray":
        yield _base(config, decoder.spec, decoder.place)


def _is_here(role: type, config: TrainConfig, device: torch.device) -> bool:
    """Whether a role of rl is played in the trainer's own memory."""
    if config.roles == "InProcess":
        return True
    if config.workers > 1:
        return False  # in the other pods
    gpus = torch.cuda.device_count()
    return choose_device_of(role, device, gpus) in ("cpu", "cuda:0")


def _base(config: TrainConfig, spec: ArchSpec, place: Placement) -> Decoder:
    decoder, bits = Decoder(spec, place), frozen_bits(config)
    if bits != "none":
        for part in decoder.parts():
            decoder.store(part, bits)
    return decoder


def need_of(weights: Iterable[Tensor], moving: Iterable[Tensor]) -> Need:
    """Return what weights need of which some move; those may be among the others or beside them."""
    moving = list(moving)
    held = {id(tensor): tensor.nbytes for tensor in (*weights, *moving)}
    gradients = sum(tensor.nbytes for tensor in moving)
    return Need(sum(held.values()), gradients, _MOMENTS * gradients)


def check_fits(need: Need, limit_bytes: int) -> None:
    """Raise TrainingDoesNotFitError if that is more than the limit."""
    if need.total > limit_bytes:
        raise TrainingDoesNotFitError(
            weights_mib=_mib(need.weights),
            gradients_mib=_mib(need.gradients),
            moments_mib=_mib(need.moments),
            limit_mib=limit_bytes >> 20,
        )


def check_computing_fits(method: str, need: ComputingNeed, limit_bytes: int) -> None:
    """Raise ComputingDoesNotFitError if that is more than the limit."""
    if need.total > limit_bytes:
        raise ComputingDoesNotFitError(
            method=method,
            weights_mib=_mib(need.weights),
            beside_mib=_mib(need.beside),
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
