"""What a method is built from: its job, its model's shape, and where it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.generate import AT_ONCE
from mizzen.runtime.train.stop import Stop
from mizzen.runtime.train.workers import Workers


@dataclass(frozen=True, slots=True)
class Stage:
    """Where roles are played on Ray: a place in each pod, the trainer's first."""

    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resident:
    """The weights of a replica that serves, lent to a job while nobody asks.

    `give_way` returns once nobody does, or raises `YieldRequested`. `spare_bytes` returns what is
    left of the replica's memory beside its models and full caches, for the job and for a step of
    the replica's own.
    """

    decoder: Decoder
    give_way: Callable[[], None]
    spare_bytes: Callable[[], int]
    step_tokens: int  # of the replica's own largest step


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a method may need to know."""

    config: TrainConfig
    spec: ArchSpec
    tokenizer: Tokenizer
    device: torch.device
    stop: Stop
    workers: Workers = field(default_factory=Workers)  # who learns the same; alone, nobody
    draw_at_most: int = AT_ONCE  # answers at once
    judge_api_key: str | None = None
    teacher_api_key: str | None = None
    admin_token: str | None = None  # of the replicas that draw
    stage: Stage | None = None  # where others than the trainer draw and judge
    resident: Resident | None = None  # what is trained beside, instead of a base of its own
