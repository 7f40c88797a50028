"""The weights that move, and their optimizer, under names that no sharding changes.

A decoder merges matrices (q, k and v are one) and pads its vocabulary, so a parameter is not yet
a checkpoint tensor. A `Trainable` shows parameters and Adam moments as the checkpoint's tensors:
views, so saving copies nothing and restoring is one copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.errors import CheckpointMismatchError

WEIGHTS, FIRST_MOMENT, SECOND_MOMENT = "weights", "exp_avg", "exp_avg_sq"


@dataclass(frozen=True, slots=True)
class NamedView:
    """A checkpoint tensor as part of a parameter."""

    name: str
    parameter: nn.Parameter
    view: Tensor

    def of(self, like_parameter: Tensor) -> Tensor:
        """Return the same part of a tensor shaped like the parameter, such as a moment."""
        offset = self.view.storage_offset() - self.parameter.storage_offset()
        return like_parameter.as_strided(self.view.shape, self.view.stride(), offset)


class Trainable:
    """Moves the weights and lists what a checkpoint must hold."""

    def __init__(
        self, views: list[NamedView], *, lora: LoraDelta | None, weight_decay: float
    ) -> None:
        self.lora = lora
        self._views = views
        self.parameters = list({id(v.parameter): v.parameter for v in views}.values())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        # Norm weights and biases are scales and offsets; pulling them to zero only hurts.
        matrices = [p for p in self.parameters if p.ndim >= 2]
        vectors = [p for p in self.parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW([group for group in groups if group["params"]])

    def step(self, *, learning_rate: float) -> None:
        """Move the weights along their gradients, and drop those."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget what was accumulated."""
        self._optimizer.zero_grad(set_to_none=True)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each moving tensor by its checkpoint name, detached."""
        for view in self._views:
            yield view.name, view.view.detach()

    def state_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return everything a checkpoint must hold; moments only once there are some."""
        groups: dict[str, dict[str, Tensor]] = {WEIGHTS: dict(self.weights())}
        for moment in (FIRST_MOMENT, SECOND_MOMENT):
            if tensors := dict(self._moments(moment)):
                groups[moment] = tensors
        return groups

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], *, steps: int) -> None:
        """Put back what `state_tensors` gave after `steps` steps.

        Raises:
            CheckpointMismatchError: the names or shapes are not this model's.
        """
        if steps:
            self._create_moments(steps)
        with torch.no_grad():
            _copy_all(tensors[WEIGHTS], dict(self.weights()))
            for moment in (FIRST_MOMENT, SECOND_MOMENT) if steps else ():
                _copy_all(tensors[moment], dict(self._moments(moment)))

    def _moments(self, moment: str) -> Iterator[tuple[str, Tensor]]:
        for view in self._views:
            state = self._optimizer.state.get(view.parameter)
            if state:
                yield view.name, view.of(state[moment])

    def _create_moments(self, steps: int) -> None:
        for parameter in self.parameters:
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(steps)),
                FIRST_MOMENT: torch.zeros_like(parameter),
                SECOND_MOMENT: torch.zeros_like(parameter),
            }


def full_views(decoder: Decoder) -> list[NamedView]:
    """Return every weight of a decoder under its checkpoint name."""
    decoder.requires_grad_(True)
    views = []
    for shard in decoder.shards():
        base = shard.tensor if isinstance(shard.tensor, nn.Parameter) else shard.tensor._base
        assert isinstance(base, nn.Parameter)
        views.append(NamedView(shard.name, base, shard.tensor))
    return views


def _copy_all(saved: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in into.items()}:
        raise CheckpointMismatchError(
            "The checkpoint's tensors are not those of this base model and adaptation. "
            "Restore the base model, or give the job a new name to start afresh."
        )
    for name, tensor in into.items():
        tensor.copy_(saved[name])
