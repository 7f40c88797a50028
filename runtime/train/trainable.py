"""The weights that move, and their optimizer, under names that no sharding changes.

A decoder merges matrices (q, k and v are one) and pads its vocabulary, so a parameter is not yet
a checkpoint tensor. A `Trainable` shows parameters and Adam moments as the checkpoint's tensors:
views, so saving copies nothing and restoring is one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta, TensorShard
from mizzen.runtime.train.errors import TensorsDifferError
from mizzen.runtime.train.parts import Part, Wanted, part_of

WEIGHTS, FIRST_MOMENT, SECOND_MOMENT = "weights", "exp_avg", "exp_avg_sq"


@dataclass(frozen=True, slots=True)
class NamedView:
    """A checkpoint tensor, or a rank's part of it, as part of a parameter."""

    name: str
    parameter: nn.Parameter
    view: Tensor
    part: Part | None = None  # None: all of it, and every rank has the same

    def of(self, like_parameter: Tensor) -> Tensor:
        """Return the same part of a tensor shaped like the parameter, such as a moment."""
        offset = self.view.storage_offset() - self.parameter.storage_offset()
        return like_parameter.as_strided(self.view.shape, self.view.stride(), offset)


class Trainable:
    """Moves the weights and lists what a checkpoint must hold."""

    def __init__(
        self,
        views: Sequence[NamedView],
        *,
        lora: LoraDelta | None,
        weight_decay: float,
        heads: Sequence[NamedView] = (),
    ) -> None:
        self.lora = lora
        self._model_views = views
        self._views = [*views, *heads]
        self.parameters = list({id(v.parameter): v.parameter for v in self._views}.values())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self._weight_decay = weight_decay
        self._moments = {
            name: [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
            for name in (FIRST_MOMENT, SECOND_MOMENT)
        }
        self.steps = 0

    def step(self, *, learning_rate: float) -> None:
        """Move the weights along their gradients, and drop those."""
        self.steps += 1
        # Norm weights and biases are scales and offsets; pulling them to zero only hurts.
        for is_matrix in (True, False):
            chosen = [i for i, p in enumerate(self.parameters) if (p.ndim >= 2) is is_matrix]
            self._adamw(chosen, learning_rate, self._weight_decay if is_matrix else 0.0)
        self.drop_gradients()

    @torch.no_grad()
    def _adamw(self, chosen: list[int], learning_rate: float, weight_decay: float) -> None:
        # The function behind torch's class: creating the class imports torch's compiler, which
        # costs seconds at every start and every resume.
        adamw(
            [self.parameters[i] for i in chosen],
            [_gradient(self.parameters[i]) for i in chosen],
            [self._moments[FIRST_MOMENT][i] for i in chosen],
            [self._moments[SECOND_MOMENT][i] for i in chosen],
            [],
            [torch.tensor(float(self.steps - 1)) for _ in chosen],
            lr=learning_rate,
            weight_decay=weight_decay,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    def gradients(self, *, is_cut: bool) -> list[Tensor]:
        """Return the gradients of what ranks hold parts of, or of what each holds whole."""
        cut = {id(view.parameter) for view in self._views if view.part is not None}
        chosen = (p for p in self.parameters if (id(p) in cut) is is_cut)
        return [p.grad for p in chosen if p.grad is not None]

    def drop_gradients(self) -> None:
        """Forget what was accumulated."""
        for parameter in self.parameters:
            parameter.grad = None

    def held(self) -> list[Tensor]:
        """Return all that a step changes, as whole tensors in an order of its own."""
        moments = (moment for held in self._moments.values() for moment in held)
        return [*(parameter.detach() for parameter in self.parameters), *moments]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each moving tensor of the model by its checkpoint name, detached: no heads."""
        for view in self._model_views:
            yield view.name, view.view.detach()

    def state_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return everything a checkpoint must hold: views, copied only when written."""
        return {
            WEIGHTS: {view.name: view.view.detach() for view in self._views},
            FIRST_MOMENT: self._moment_views(FIRST_MOMENT),
            SECOND_MOMENT: self._moment_views(SECOND_MOMENT),
        }

    def wanted(self) -> dict[str, Wanted]:
        """Return which part of each checkpoint tensor is this rank's, of those that are cut."""
        return {v.name: Wanted(v.part, tuple(v.view.shape)) for v in self._views if v.part}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], *, steps: int) -> None:
        """Put back what `state_tensors` gave after `steps` steps.

        Raises:
            TensorsDifferError: the names or shapes are not this model's.
        """
        self.steps = steps
        with torch.no_grad():
            for group, into in self.state_tensors().items():
                _copy_all(tensors.get(group, {}), into)

    def _moment_views(self, moment: str) -> dict[str, Tensor]:
        place = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        held = self._moments[moment]
        return {v.name: v.of(held[place[id(v.parameter)]]) for v in self._views}


def full_views(decoder: Decoder) -> list[NamedView]:
    """Return every weight of a decoder under its checkpoint name."""
    decoder.requires_grad_(True)
    return views_of(decoder.shards(), ranks=decoder.group.size)


def views_of(shards: Iterable[TensorShard], *, ranks: int) -> list[NamedView]:
    """Return what a rank of so many holds of checkpoint tensors as parts of its parameters."""
    views = []
    for shard in shards:
        base = shard.tensor if isinstance(shard.tensor, nn.Parameter) else shard.tensor._base
        assert isinstance(base, nn.Parameter)
        part = part_of(shard) if ranks > 1 else None
        views.append(NamedView(shard.name, base, shard.tensor, part))
    return views


def _gradient(parameter: nn.Parameter) -> Tensor:
    # A weight no token reached, such as an adapter of a layer that was skipped, stays as it is.
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _copy_all(saved: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in into.items()}:
        raise TensorsDifferError
    for name, tensor in into.items():
        tensor.copy_(saved[name])
