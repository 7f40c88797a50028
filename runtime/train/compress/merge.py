"""One model out of several: adapters or differences added to the base, or models averaged.

Differences are how Vicuna's first weights were given out: target = base + delta, tensor by tensor
(FastChat's apply_delta).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mizzen.runtime.model.arch import find_checkpoint
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import open_checkpoint
from mizzen.runtime.model.lora import PATHS, load_adapter
from mizzen.runtime.model.names import WeightSource
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.options import Merge, MergePart


@torch.no_grad()
def merge(decoder: Decoder, rules: Merge) -> None:
    """Change the base's weights into the merged ones.

    Raises:
        JobConfigError: a part does not fit the base.
        BadAdapterError, BadModelError: a part cannot be read.
    """
    if rules.kind == "adapter":
        for part in rules.parts:
            _add_adapter(decoder, part)
        return
    total = 1.0
    if rules.kind == "average":
        total = rules.base_weight + sum(part.weight for part in rules.parts)
        if total <= 0:
            raise JobConfigError(
                f"The weights of merge.parts and merge.baseWeight sum up to {total:g}. "
                "Choose some whose sum is above zero."
            )
        _each(decoder, lambda _, tensor: tensor.mul_(rules.base_weight / total))
    for part in rules.parts:
        _add_model(decoder, part, share=part.weight / total)


def _add_adapter(decoder: Decoder, part: MergePart) -> None:
    adapter = load_adapter(part.source)
    shards = {shard.name: shard.tensor for shard in decoder.shards()}
    for site, (a_RI, b_OR) in adapter.pairs.items():
        weight_OI = shards.get(f"model.layers.{site.layer}.{PATHS[site.target]}.weight")
        if weight_OI is None or weight_OI.shape != (b_OR.shape[0], a_RI.shape[1]):
            raise JobConfigError(
                f"The adapter {part.source.name} changes {site.target} of layer {site.layer}, "
                "which this base has not or not in that size. Merge it into the model it was "
                "trained on."
            )
        addition_OI = b_OR.float() @ a_RI.float() * (part.weight * adapter.config.scale)
        weight_OI.add_(addition_OI.to(weight_OI))


def _add_model(decoder: Decoder, part: MergePart, *, share: float) -> None:
    _, source = open_checkpoint(find_checkpoint(part.source))

    def add(name: str, tensor: Tensor) -> None:
        tensor.add_(_read(source, name, tensor, part).to(tensor), alpha=share)

    _each(decoder, add)


def _read(source: WeightSource, name: str, like: Tensor, part: MergePart) -> Tensor:
    if (shape := source.shape(name)) != tuple(like.shape):
        raise JobConfigError(
            f"{name} has shape {list(shape)} in {part.source.name} and {list(like.shape)} in the "
            "base. Models of one architecture and vocabulary can be merged."
        )
    return source.read(name)


def _each(decoder: Decoder, change: Callable[[str, Tensor], object]) -> None:
    for shard in decoder.shards():
        change(shard.name, shard.tensor)
