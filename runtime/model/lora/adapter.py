"""What an adapter is: matrices at some of the model's linears, and how strongly they count."""

# Shapes: T packed tokens, I and O a linear's input and output width on this rank, R adapter rank.
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


class Site(NamedTuple):
    """One linear of one layer."""

    layer: int
    target: str

    def tensor_name(self, side: str) -> str:
        """Return PEFT's name of matrix "A" or "B" at this linear."""
        path = f"layers.{self.layer}.{PATHS[self.target]}"
        return f"base_model.model.model.{path}.lora_{side}.weight"


class Pair(NamedTuple):
    """An adapter's two matrices at one linear: B A x has the linear's output width."""

    a_RI: Tensor
    b_OR: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Size and places of an adapter."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = tuple(PATHS)
    is_rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilized else self.rank)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A whole adapter as its files hold it: unscaled, not sharded."""

    config: LoraConfig
    pairs: Mapping[Site, Pair]
