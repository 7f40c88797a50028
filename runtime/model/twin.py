"""A second view of a served model: the same weights, summed over the ranks by lines of its own."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import Placement
from mizzen.runtime.parallel.group import RankGroup


def twin_of(decoder: Decoder, group: RankGroup) -> Decoder:
    """Return a decoder of the same weights whose collectives are those of `group`.

    It may compute while the first one does: collectives of one group must come in the same order
    on every rank, which two threads cannot promise each other.
    """
    twins: dict[nn.Module, nn.Module] = {}
    twin = _copy(decoder, decoder.group, group, twins)
    assert isinstance(twin, Decoder)
    return twin


def _copy(
    module: nn.Module, old: RankGroup, new: RankGroup, twins: dict[nn.Module, nn.Module]
) -> nn.Module:
    if module in twins:  # an embedding that is the head too
        return twins[module]
    twin = twins[module] = copy.copy(module)
    for name, value in vars(module).items():
        if value is old:
            vars(twin)[name] = new
        elif isinstance(value, Placement):
            vars(twin)[name] = replace(value, group=new)
    vars(twin)["_modules"] = {
        name: None if child is None else _copy(child, old, new, twins)
        for name, child in module._modules.items()
    }
    return twin
