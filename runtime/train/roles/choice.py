"""Who plays the roles of a job that leaves it open."""

from __future__ import annotations

import logging

import torch

from mizzen.runtime.model.arch import ArchSpec, find_checkpoint
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.memory import memory_limit, plan_need

log = logging.getLogger(__name__)

# Ray's own processes hold 0.3 GiB, and each of three roles 0.4 before it has read anything; on a
# GPU each also has a context there.
_PROCESSES_BYTES = 2 << 30


def settle_roles(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Return the job with its roles given out: to Ray in the trainer's pod, or to the trainer.

    By default they are processes of their own where nothing speaks against it. Several workers each
    learn from their share and so play all roles themselves; ranks of one model, and replicas that
    draw, leave nothing to play.

    Raises:
        MizzenError: the base model cannot be read, or not trained in the way the job asks for.
    """
    if config.roles != "Auto":
        return config
    on_ray = config.model_copy(update={"roles": "Ray"})
    if _may_be_on_ray(config) and _has_room(on_ray, device):
        return on_ray
    return config.model_copy(update={"roles": "InProcess"})


def _may_be_on_ray(config: TrainConfig) -> bool:
    # Ranks of one model are workers too.
    return config.rl is not None and config.rl.rollout is None and config.workers == 1


def _has_room(on_ray: TrainConfig, device: torch.device) -> bool:
    """Whether the roles' models and processes leave half of the memory for what they compute."""
    spec = ArchSpec.from_dir(find_checkpoint(on_ray.base_model))
    held = plan_need(on_ray, spec, device).total + _PROCESSES_BYTES
    host = torch.device("cpu")  # where the processes are, also when the models are on a GPU
    for count, limit in ((held, memory_limit(device)), (_PROCESSES_BYTES, memory_limit(host))):
        if 2 * count > limit:
            log.info(
                "The trainer plays all roles: on Ray they would hold %d MiB, more than half of "
                "the %d MiB that there are.",
                count >> 20,
                limit >> 20,
            )
            return False
    return True
