"""An adapter that learns."""

# Shapes: T packed tokens, I and O a linear's input and output width on this rank, R adapter rank.
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mizzen.runtime.errors import TensorParallelInvalidError
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.lora.adapter import Adapter, LoraConfig, Pair, Site
from mizzen.runtime.model.lora.sites import site_shapes


class TrainableLora(nn.Module):
    """An adapter being trained. Kept in float32, so that small steps are not rounded away.

    B starts at zero: before the first step the model is the base model.
    """

    def __init__(self, decoder: Decoder, config: LoraConfig, *, seed: int = 0) -> None:
        super().__init__()
        if decoder.group.size > decoder.spec.kv_heads:
            # Ranks that share a KV head would each see only a share of its gradient.
            raise TensorParallelInvalidError(
                f"Training over {decoder.group.size} ranks needs as many KV heads, and the model "
                f"has {decoder.spec.kv_heads}. Use fewer ranks."
            )
        self.config = config
        self._group = decoder.group
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
        a_RI, b_OR = self.a[key], self.b[key]
        # The matrix that every rank holds whole is used by each in part: its gradient is a sum.
        if self._shapes[target].columns is None:
            a_RI = self._group.copy(a_RI)
        else:
            b_OR = self._group.copy(b_OR)
        x_TI, dtype = x_TI.to(a_RI.dtype), x_TI.dtype
        x_TI = F.dropout(x_TI, self.config.dropout, self.training)
        return (F.linear(F.linear(x_TI, a_RI), b_OR) * self.config.scale).to(dtype)

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
