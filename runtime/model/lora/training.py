"""An adapter that learns."""

# Shapes: T packed tokens, I and O a linear's input and output width on this rank, R adapter rank.
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import TensorShard
from mizzen.runtime.model.lora.adapter import Adapter, LoraConfig, Pair, Site
from mizzen.runtime.model.lora.sites import SiteShape, site_shapes
from mizzen.runtime.parallel.shard import check_trainable


class TrainableLora(nn.Module):
    """An adapter being trained. Kept in float32, so that small steps are not rounded away.

    B starts at zero: before the first step the model is the base model.
    """

    def __init__(self, decoder: Decoder, config: LoraConfig, *, seed: int = 0) -> None:
        super().__init__()
        check_trainable(kv_heads=decoder.spec.kv_heads, size=decoder.group.size)
        self.config = config
        self._group = decoder.group
        self.ranks = decoder.group.size
        self._shapes = site_shapes(decoder)
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)
        for layer in range(decoder.spec.layers):
            for target in config.targets:
                pair = self._shapes[target].cut(self._initial(target, generator))
                for side, matrix in ((self.a, pair.a_RI), (self.b, pair.b_OR)):
                    side[_key(layer, target)] = nn.Parameter(
                        matrix.to(decoder.place.device, torch.float32, copy=True)
                    )

    def _initial(self, target: str, generator: torch.Generator) -> Pair:
        # Every rank draws the whole matrix, so that the start does not depend on their number.
        shape, rank = self._shapes[target], self.config.rank
        bound = 1 / math.sqrt(shape.width_in)  # as nn.Linear starts
        a_RI = (torch.rand(rank, shape.width_in, generator=generator) * 2 - 1) * bound
        return Pair(a_RI, torch.zeros(shape.width_out, rank))

    def delta(self, layer: int, target: str, x_TI: Tensor) -> Tensor | None:
        """Return the adapter's addition, in the type of `x`."""
        key = _key(layer, target)
        if key not in self.a:
            return None
        a_RI, b_OR, shape = self.a[key], self.b[key], self._shapes[target]
        # The matrix that every rank holds whole is used by each in part: its gradient is a sum.
        if shape.columns is None:
            a_RI = self._group.copy(a_RI)
        else:
            b_OR = self._group.copy(b_OR)
        x_TI, dtype = x_TI.to(a_RI.dtype), x_TI.dtype
        x_TI = self._dropped(x_TI, shape)
        return (F.linear(F.linear(x_TI, a_RI), b_OR) * self.config.scale).to(dtype)

    def _dropped(self, x_TI: Tensor, shape: SiteShape) -> Tensor:
        rate = self.config.dropout
        if self._group.size == 1 or shape.columns is None:
            return F.dropout(x_TI, rate, self.training)
        # Drawn for all ranks' inputs: what is dropped does not depend on the number of ranks.
        kept_TI = F.dropout(x_TI.new_ones(x_TI.shape[0], shape.width_in), rate, self.training)
        return x_TI * kept_TI[:, shape.columns.start : shape.columns.stop]

    def shards(self) -> Iterator[TensorShard]:
        """Yield each matrix as part of a whole one, by PEFT's names."""
        for site, (a_RI, b_OR) in self.pairs():
            shape, rank = self._shapes[site.target], self.config.rank
            whole_a, whole_b = (rank, shape.width_in), (shape.width_out, rank)
            yield TensorShard(site.tensor_name("A"), a_RI, whole_a, columns=shape.columns)
            yield TensorShard(site.tensor_name("B"), b_OR, whole_b, rows=shape.rows)

    def pairs(self) -> Iterator[tuple[Site, Pair]]:
        """Yield this rank's matrices; views, so that a checkpoint can be copied into them."""
        for key, a_RI in self.a.items():
            layer, target = key.split(":")
            yield Site(int(layer), target), Pair(a_RI, self.b[key])

    def adapter(self) -> Adapter:
        """Return the adapter as its files hold it. For a group of one rank."""
        return Adapter(self.config, dict(self.pairs()))


def _key(layer: int, target: str) -> str:
    return f"{layer}:{target}"
