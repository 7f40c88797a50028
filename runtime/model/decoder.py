"""The one decoder. It computes hidden states of packed tokens and knows nothing of caches.

A rank of one of several stages holds the layers of its stage alone: tokens enter at the first,
scores are made at the last.
"""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, D model width, N chosen positions, V vocabulary.
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mizzen.runtime.attention.paged_cpu import PagedCpu
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.block import Attend, Block
from mizzen.runtime.model.layers import (
    ColumnLinear,
    Linear,
    LoraDelta,
    Norm,
    Placement,
    Replicated,
    RowLinear,
    TensorShard,
    VocabTable,
)
from mizzen.runtime.model.packed import Quantization, can_pack
from mizzen.runtime.model.rope import inverse_frequencies, rope_tables
from mizzen.runtime.model.stack import LayerStack
from mizzen.runtime.parallel.shard import head_shard


class Ending(NamedTuple):
    """What comes out at the end: the hidden states that pooling reads, and float32 scores."""

    hidden_ND: Tensor
    logits_NV: Tensor


class Decoder(nn.Module):
    """This rank's part of the model. Weights are unset until a loader fills `shards()`."""

    def __init__(self, spec: ArchSpec, place: Placement) -> None:
        super().__init__()
        group = place.group
        self.spec = spec
        self.place = place
        self.group = group
        self.heads = head_shard(
            heads=spec.heads, kv_heads=spec.kv_heads, rank=group.rank, size=group.size
        )
        self.layers = group.stages.layers(spec.layers)
        self.embedding = self.positions = self.embedding_norm = self.project_in = None
        if group.stages.is_first:
            self._hold_entry()
        layers = range(self.layers.start, self.layers.stop)
        self.blocks = nn.ModuleList(Block(spec, layer, self.heads, place) for layer in layers)
        self.norm = self.project_out = self.head = None
        if group.stages.is_last:
            self._hold_exit()
        # No buffer: `decoder.to(dtype)` must not round angles.
        self._rope_speeds = inverse_frequencies(spec.rope, spec.head_dim).to(place.device)

    def _hold_entry(self) -> None:
        spec, place = self.spec, self.place
        width, narrow = spec.hidden_size, spec.embedding_size
        self.embedding = self._table("model.embed_tokens")
        if spec.positions == "learned":
            rows = spec.max_len + spec.position_offset
            self.positions = Replicated("model.embed_positions", rows, width, place=place)
        if spec.has_embedding_norm:
            self.embedding_norm = Norm("model.embed_norm", width, spec, place=place)
        if narrow:
            self.project_in = Replicated("model.project_in", width, narrow, place=place)

    def _hold_exit(self) -> None:
        spec, place = self.spec, self.place
        width, narrow = spec.hidden_size, spec.embedding_size
        if spec.has_final_norm:
            self.norm = Norm("model.norm", width, spec, place=place)
        if narrow:
            self.project_out = Replicated("model.project_out", narrow, width, place=place)
        if not spec.tied:
            self.head = self._table("lm_head", bias=spec.has_head_bias)
        else:  # the first stage has one of its own, unless it is this one
            self.head = self.embedding or self._table("model.embed_tokens")

    def _table(self, name: str, *, bias: bool = False) -> VocabTable:
        spec = self.spec
        width = spec.embedding_size or spec.hidden_size
        return VocabTable(name, spec.vocab_size, width, bias=bias, place=self.place)

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        lora: LoraDelta | None = None,
    ) -> Tensor:
        """Return the hidden state that `logits` and pooling read, equal on every rank.

        On a stage before the last it is what went on to the next one.
        """
        x_TD = self._enter(token_ids_T, positions_T)
        tables = None
        if self.spec.positions == "rope":
            tables = rope_tables(
                positions_T,
                self._rope_speeds,
                self.spec.rope,
                head_dim=self.spec.head_dim,
                dtype=x_TD.dtype,
            )
        x_TD = self._run_layers(x_TD, tables, attend, lora)
        if not self.group.stages.is_last:
            self.group.stages.send(x_TD)
            return x_TD
        if self.norm is not None:
            x_TD = self.norm(x_TD)
        return x_TD if self.project_out is None else F.linear(x_TD, self.project_out.weight)

    def _run_layers(
        self,
        x_TD: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        attend: Attend,
        lora: LoraDelta | None,
    ) -> Tensor:
        if lora is None and isinstance(attend, PagedCpu) and self._stack is not None:
            return self._stack(x_TD, tables, attend)
        for block in self.blocks:
            x_TD = block(x_TD, tables, attend, lora)
        return x_TD

    @cached_property
    def _stack(self) -> LayerStack | None:
        """The layers as one call, where our kernels know them and all weights are packed."""
        blocks = [cast(Block, block) for block in self.blocks]
        if self.group.size > 1 or not LayerStack.suits(blocks, self.spec):
            return None
        return LayerStack(blocks, self.spec)

    def _enter(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        if self.embedding is None:
            return self.group.stages.receive(self._unset(len(token_ids_T), self.spec.hidden_size))
        x_TD = self.embedding.embed(token_ids_T)
        if self.project_in is not None:
            x_TD = F.linear(x_TD, self.project_in.weight)
        if self.positions is not None:
            at_T = positions_T + self.spec.position_offset
            x_TD = x_TD + F.embedding(at_T, self.positions.weight)
        return x_TD if self.embedding_norm is None else self.embedding_norm(x_TD)

    def _unset(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.place.dtype, device=self.place.device)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return float32 logits_NV over the whole vocabulary, equal on every rank.

        Where there are several stages, only the ranks of the last one can tell.
        """
        return self.head.logits(hidden_ND)

    def finish(self, hidden_ND: Tensor) -> Ending | None:
        """Return what the rows of `forward`'s output come to, on rank 0 and on the last stage.

        Every rank must call it alike.
        """
        stages = self.group.stages
        if not stages.is_last:
            return self._take_back(len(hidden_ND)) if stages.rank == 0 else None
        ending = Ending(hidden_ND, self.logits(hidden_ND))
        if stages.count > 1:
            # As one message: each costs a way through the network.
            stages.give_back(torch.cat((hidden_ND.float(), ending.logits_NV), dim=-1))
        return ending

    def _take_back(self, rows: int) -> Ending:
        spec = self.spec
        width = spec.embedding_size or spec.hidden_size
        both = self._unset(rows, width + spec.vocab_size, dtype=torch.float32)
        return Ending(*self.group.stages.take_back(both).split((width, spec.vocab_size), dim=-1))

    def shards(self) -> Iterator[TensorShard]:
        """Yield views of every held part of a checkpoint tensor, each name once.

        Loaders copy into them; on a group of one rank they are the whole checkpoint, in our names.
        """
        for part in self.parts():
            yield from part.shards()

    def parts(self) -> Iterator[ColumnLinear | RowLinear | VocabTable | Replicated]:
        """Yield the modules that hold weights."""
        for module in self.modules():
            if isinstance(module, (ColumnLinear, RowLinear, VocabTable, Replicated)):
                yield module

    @property
    def lets_gradients_through(self) -> bool:
        """Whether an adapter can learn beside these weights as they are kept."""
        linears = (part for part in self.parts() if isinstance(part, Linear))
        return all(linear.lets_gradients_through for linear in linears)

    def prepack(self) -> bool:
        """Make a CPU model faster and final: it cannot be trained or reloaded afterwards.

        Returns whether this device and torch can do it; nothing has changed if not.
        """
        if not can_pack(self.place.dtype, self.place.device):
            return False
        for part in self.parts():
            self.pack(part, "none")
        return True

    def pack(self, part: nn.Module, quantization: Quantization) -> None:
        """Pack a part if it is a matrix that multiplies; one that is packed stays as it is."""
        if not isinstance(part, Linear) or (part is self.embedding and part is not self.head):
            return
        part.pack(self._kind(part, quantization), is_read_by_row=part is self.embedding)
        self.__dict__.pop("_stack", None)

    def store(self, part: nn.Module, quantization: Quantization) -> None:
        """Keep a part in few bits and let gradients through, if it is a matrix that multiplies.

        The table of token vectors stays as it is, and with it the head where they are one.
        """
        if isinstance(part, Linear) and part is not self.embedding:
            part.store(self._kind(part, quantization))

    def _kind(self, part: Linear, quantization: Quantization) -> Quantization:
        # Every token's score hangs on the head alone, so it keeps 8 bits, all of them digits.
        is_head = part is self.head and quantization in ("int4", "fp8")
        return "int8" if is_head else quantization
