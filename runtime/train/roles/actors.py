"""The roles as processes of their own: each has its own copy of what it needs, and the same code.

Knows nothing of Ray: these are plain classes, which `on_ray.py` places.
"""

# Shapes: N answer tokens.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import find_checkpoint
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.adaptation import build_lora, load_base
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.device import choose_dtype, products_in
from mizzen.runtime.train.generate import draw_answers, drawing_of
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.rewards import Rewards
from mizzen.runtime.train.roles.roles import reference_log_probs
from mizzen.runtime.train.samples import Floats, Prompt, Sample
from mizzen.runtime.train.stop import StopFlag

_BUCKET_ELEMENTS = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a role is played and for which job; `threads` as many as the trainer's.

    With another number of threads a CPU would round sums differently.
    """

    config: TrainConfig
    device: str
    threads: int

    def take(self) -> torch.device:
        """Set this process up and return its device."""
        torch.set_num_threads(self.threads)
        return torch.device(self.device)

    def precision(self) -> AbstractContextManager[object]:
        """Return what this job's models compute inside of, as the trainer's do."""
        config, device = self.config, torch.device(self.device)
        if config.adaptation.type != "full":
            return nullcontext()
        return products_in(choose_dtype(config.hyperparameters.dtype, device), device)


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Some elements of one of the policy's moving tensors, as it lies in memory."""

    tensor: int  # its place among them
    start: int
    values: npt.NDArray[np.float32]


def moving_weights(decoder: Decoder, lora: nn.Module | None) -> list[Tensor]:
    """Return what a step moves of a policy, in an order that is the same everywhere."""
    return [parameter.detach() for parameter in (lora or decoder).parameters()]


def cut_weights(
    tensors: Sequence[Tensor], elements: int = _BUCKET_ELEMENTS
) -> Iterator[list[WeightPart]]:
    """Yield tensors in buckets of at most `elements`, so that no more are under way at once."""
    bucket: list[WeightPart] = []
    room = elements
    for place, tensor in enumerate(tensors):
        flat = tensor.reshape(-1)
        start = 0
        while start < len(flat):
            part = flat[start : start + room]
            bucket.append(WeightPart(place, start, part.cpu().numpy()))
            start, room = start + len(part), room - len(part)
            if not room:
                yield bucket
                bucket, room = [], elements
    if bucket:
        yield bucket


class RolloutRole:
    """Draws answers from a copy of the policy, whose weights it is sent."""

    def __init__(self, seat: Seat) -> None:
        device = seat.take()
        self._seat = seat
        config = seat.config
        assert config.rl is not None, "checked by the job's configuration"
        self._decoder = load_base(config, device)
        is_whole = config.adaptation.type == "full"
        self._lora = None if is_whole else build_lora(self._decoder, config).eval()
        self._weights = moving_weights(self._decoder, self._lora)
        tokenizer = Tokenizer.load(find_checkpoint(config.base_model))
        self._drawing = drawing_of(config.rl, tokenizer)

    @torch.no_grad()
    def take(self, bucket: Sequence[WeightPart]) -> None:
        """Go on with these weights."""
        for part in bucket:
            # A copy: what lies in Ray's store is read-only, which torch does not know.
            values = torch.tensor(part.values)
            into = self._weights[part.tensor].view(-1)
            into[part.start : part.start + len(values)].copy_(values)

    def draw(self, prompts: Sequence[Prompt], seed: int) -> list[list[int]]:
        """Return an answer to each prompt."""
        # Nobody asks this process to stop: it ends with the trainer.
        with self._seat.precision():
            return draw_answers(
                self._decoder, prompts, self._lora, self._drawing, seed=seed, stop=StopFlag()
            )


class ReferenceRole:
    """Says how likely the model that the policy started from finds answers."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._decoder = load_base(seat.config, seat.take())
        self._at_once = AtOnce(seat.config.hyperparameters.micro_batch)

    def log_probs(self, samples: Sequence[Sample]) -> list[Floats]:
        """Return log_probs_N of each answer."""
        with self._seat.precision():
            return reference_log_probs(self._decoder, samples, self._seat.config, self._at_once)


class RewardRole:
    """Says what answers are worth."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._device = seat.take()
        tokenizer = Tokenizer.load(find_checkpoint(seat.config.base_model))
        self._rewards = Rewards(seat.config, tokenizer, self._device)

    def of(self, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[float]:
        """Return each answer's reward."""
        with self._seat.precision():
            return self._rewards.of(prompts, answers, base=self._base, group=RankGroup())

    def _base(self) -> Decoder:
        return load_base(self._seat.config, self._device)


def choose_device_of(role: type, trainer: torch.device, gpus: int) -> str:
    """Return a role's device: the pod's GPUs in turn, of which the trainer has the first. Pure."""
    number = 1 + (RolloutRole, ReferenceRole, RewardRole).index(role)
    return f"cuda:{number % gpus}" if trainer.type == "cuda" else trainer.type
