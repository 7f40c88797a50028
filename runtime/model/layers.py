"""The decoder's parts. Each knows which shard of the checkpoint it holds and loads it itself.

Column-parallel linears hold some output rows and give a part of the output; row-parallel ones
hold some input columns and give a share of the sum, which their caller all-reduces.
"""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, I and O a linear's input and output width on this rank.
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mizzen.runtime.kernels import ops
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.beside import is_recoverable, multiply_beside
from mizzen.runtime.model.packed import PackedWeight, Quantization, pack
from mizzen.runtime.model.panels import PanelWeight
from mizzen.runtime.model.stored import StoredWeight, store
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.shard import Span, even_span

_VOCAB_MULTIPLE = 64  # matmuls run best on such widths, and every rank's part must be equal


class LoraDelta(Protocol):
    """What the decoder asks of adapters, whether they are being trained or served."""

    def delta(self, layer: int, target: str, x_TI: Tensor) -> Tensor | None:
        """Return what the adapters add to linear `target` ("q_proj", ...) of `layer`, or None."""
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    """Dtype and device of a model's weights, and the group that shares them."""

    dtype: torch.dtype
    device: torch.device
    group: RankGroup

    def empty(self, *shape: int) -> nn.Parameter:
        """Return an unset weight; loaded models are frozen until a trainer says otherwise."""
        data = torch.empty(shape, dtype=self.dtype, device=self.device)
        return nn.Parameter(data, requires_grad=False)


class Linear(nn.Module):
    """A matrix and an optional bias whose weight may be packed for the CPU."""

    def __init__(self, rows: int, columns: int, *, bias: bool, place: Placement) -> None:
        super().__init__()
        self.outputs, self.inputs = rows, columns
        self.weight = place.empty(rows, columns)
        self.bias = place.empty(rows) if bias else None
        self._packed: PackedWeight | None = None
        self._input_sharers = RankGroup()  # who has other inputs of the same outputs

    def matmul(
        self, x_TI: Tensor, *, bias: bool = True, residual_TO: Tensor | None = None
    ) -> Tensor:
        """Return `x` times the weight, plus the bias unless told not to, plus the residual."""
        addend, packed = self.bias if bias else None, self._packed
        if packed is None:
            out_TO = F.linear(x_TI, self.weight, addend)
        elif x_TI.requires_grad and is_recoverable(packed):
            out_TO = multiply_beside(x_TI, addend, packed)
        elif self.panels is not None:
            return self.panels(x_TI, addend, residual_TO)
        else:
            out_TO = packed(x_TI, addend)
        return out_TO if residual_TO is None else residual_TO + out_TO

    def pack(self, quantization: Quantization = "none", *, is_read_by_row: bool = False) -> None:
        """Pack the weight, once: it cannot be trained or loaded anew afterwards."""
        if self._packed is not None:
            return
        self._packed = pack(self.weight, quantization)
        if self._packed is None:
            return
        if self._readable is not None or not is_read_by_row:
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def store(self, quantization: Quantization) -> None:
        """Keep the weight in few bits and let gradients through, for what is trained beside it."""
        self._packed = store(self.weight, quantization, self._input_sharers)
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    @property
    def lets_gradients_through(self) -> bool:
        """Whether what is multiplied by this weight can learn, though the weight does not."""
        packed = self._packed
        return packed is None or isinstance(packed, StoredWeight) or is_recoverable(packed)

    def rows(self, at_T: Tensor) -> Tensor:
        """Return these rows of the weight; of a packed one, if `is_read_by_row` was said."""
        if self._readable is not None:
            return self._readable.rows(at_T)
        return F.embedding(at_T, self.weight)

    @property
    def panels(self) -> PanelWeight | None:
        """The weight, if it is packed in panels."""
        return self._packed if isinstance(self._packed, PanelWeight) else None

    @property
    def _readable(self) -> PanelWeight | None:
        """The packed weight, if its rows are still what they were."""
        return None if self.panels is None or self.panels.has_8_bits else self.panels


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint matrix: its name, and this rank's share of the dimension that is cut."""

    name: str  # as adapters call it: "q_proj"
    path: str  # under the layer: "self_attn.q_proj"
    span: Span
    total: int  # of all ranks


@dataclass(frozen=True, slots=True)
class TensorShard:
    """A view of part of a checkpoint tensor: what a rank holds of it, and where it belongs."""

    name: str
    tensor: Tensor
    whole: tuple[int, ...]  # the shape of the whole tensor
    rows: Span | None = None
    columns: Span | None = None


class ColumnLinear(Linear):
    """Several output-sharded matrices that read the same input, as one matmul."""

    def __init__(
        self, prefix: str, parts: list[Part], columns: int, *, bias: bool, place: Placement
    ) -> None:
        super().__init__(sum(p.span.size for p in parts), columns, bias=bias, place=place)
        self.prefix = prefix
        self.parts = parts
        self.columns = columns

    def forward(self, x_TI: Tensor, layer: int, lora: LoraDelta | None) -> list[Tensor]:
        """Return each part's output for this rank's rows, adapters included."""
        outputs = list(self.matmul(x_TI).split([p.span.size for p in self.parts], dim=-1))
        if lora is not None:
            for index, part in enumerate(self.parts):
                delta = lora.delta(layer, part.name, x_TI)
                if delta is not None:
                    outputs[index] = outputs[index] + delta
        return outputs

    def shards(self) -> Iterator[TensorShard]:
        """Yield views of the held part of each checkpoint tensor."""
        start = 0
        for part in self.parts:
            path, held = f"{self.prefix}{part.path}", slice(start, start + part.span.size)
            whole = (part.total, self.columns)
            yield TensorShard(f"{path}.weight", self.weight[held], whole, rows=part.span)
            if self.bias is not None:
                yield TensorShard(f"{path}.bias", self.bias[held], whole[:1], rows=part.span)
            start = held.stop


class RowLinear(Linear):
    """An input-sharded matrix. Its output is a share of the sum until the group reduces it."""

    def __init__(self, prefix: str, part: Part, rows: int, *, bias: bool, place: Placement) -> None:
        super().__init__(rows, part.span.size, bias=bias, place=place)
        self.prefix = prefix
        self.part = part
        self.rows = rows
        self._group = self._input_sharers = place.group

    def forward(
        self, x_TI: Tensor, layer: int, lora: LoraDelta | None, *, stream_TO: Tensor | None = None
    ) -> Tensor:
        """Return this rank's share of the output, which `sum_shares` makes whole.

        With a stream, return that with the whole output added, equal on every rank.
        """
        if stream_TO is not None and self._group.size == 1:
            return self._adapted(self.matmul(x_TI, residual_TO=stream_TO), x_TI, layer, lora)
        share_TO = self.matmul(x_TI, bias=self._group.size == 1)
        share_TO = self._adapted(share_TO, x_TI, layer, lora)
        return (
            share_TO if stream_TO is None else stream_TO + sum_shares(self._group, share_TO, self)
        )

    def _adapted(self, out_TO: Tensor, x_TI: Tensor, layer: int, lora: LoraDelta | None) -> Tensor:
        # An adapter is linear too: its shares take part in the same sum.
        delta = lora.delta(layer, self.part.name, x_TI) if lora is not None else None
        return out_TO if delta is None else out_TO + delta

    def shards(self) -> Iterator[TensorShard]:
        """Yield views of the held part of each checkpoint tensor."""
        path = f"{self.prefix}{self.part.path}"
        whole = (self.rows, self.part.total)
        yield TensorShard(f"{path}.weight", self.weight, whole, columns=self.part.span)
        if self.bias is not None:
            yield TensorShard(f"{path}.bias", self.bias, whole[:1])


def sum_shares(group: RankGroup, share_TO: Tensor, *linears: RowLinear) -> Tensor:
    """Return the sum of what `linears` gave on all ranks, equal on every rank."""
    if group.size == 1:
        return share_TO
    out_TO = group.all_reduce(share_TO)
    for linear in linears:
        # The bias follows the sum: added to each rank's share it would count once per rank.
        if linear.bias is not None:
            out_TO = out_TO + linear.bias
    return out_TO


class VocabTable(Linear):
    """Token vectors, sharded by token: the embedding, and the output head in its other use.

    The vocabulary is padded so that every rank has the same number of rows; padding is zero.
    """

    def __init__(
        self, name: str, vocab: int, columns: int, *, bias: bool = False, place: Placement
    ) -> None:
        multiple = _VOCAB_MULTIPLE * place.group.size
        padded = -(-vocab // multiple) * multiple
        self.span = even_span(padded, rank=place.group.rank, size=place.group.size)
        super().__init__(self.span.size, columns, bias=bias, place=place)
        self.name = name
        self.vocab = vocab
        self._group = place.group
        with torch.no_grad():
            self.weight[self._held :].zero_()

    @property
    def _held(self) -> int:
        """How many of this rank's rows are tokens, not padding."""
        return max(0, min(self.vocab - self.span.start, self.span.size))

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Return each token's vector, equal on every rank."""
        if self._group.size == 1:
            return self.rows(token_ids_T)
        local_T = token_ids_T - self.span.start
        is_elsewhere_T = (local_T < 0) | (local_T >= self.span.size)
        vectors = self.rows(local_T.masked_fill(is_elsewhere_T, 0))
        return self._group.all_reduce(vectors.masked_fill(is_elsewhere_T[:, None], 0))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return float32 scores over the whole vocabulary, equal on every rank."""
        is_served = self.panels is not None and not hidden_ND.requires_grad
        if self._group.size == 1 and is_served:
            # The sums are float32: not rounded on the way, they need not be widened after it.
            scores_NV = self.panels(hidden_ND, self.bias, dtype=torch.float32)
            return scores_NV[:, : self.vocab]
        local_NV = self.matmul(self._group.copy(hidden_ND))
        return self._group.all_gather(local_NV)[:, : self.vocab].float()

    def shards(self) -> Iterator[TensorShard]:
        """Yield views of the held part of each checkpoint tensor."""
        held, whole = self._held, (self.vocab, self.weight.shape[1])
        rows = Span(self.span.start, held)
        yield TensorShard(f"{self.name}.weight", self.weight[:held], whole, rows=rows)
        if self.bias is not None:
            yield TensorShard(f"{self.name}.bias", self.bias[:held], whole[:1], rows=rows)


class Replicated(nn.Module):
    """A weight, and perhaps a bias, that every rank holds whole."""

    def __init__(self, name: str, *shape: int, bias: bool = False, place: Placement) -> None:
        super().__init__()
        self.weight = place.empty(*shape)
        self.bias = place.empty(*shape) if bias else None
        self.name = name

    def shards(self) -> Iterator[TensorShard]:
        """Yield the whole tensors."""
        yield TensorShard(f"{self.name}.weight", self.weight, tuple(self.weight.shape))
        if self.bias is not None:
            yield TensorShard(f"{self.name}.bias", self.bias, tuple(self.bias.shape))


class Norm(Replicated):
    """RMS norm scales to unit root mean square, layer norm centres first and has a bias."""

    def __init__(self, name: str, width: int, spec: ArchSpec, *, place: Placement) -> None:
        super().__init__(name, width, bias=spec.norm == "layer", place=place)
        self.eps = spec.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight, bias = self._scale_and_shift()
        if bias is not None:
            return ops.layer_norm(x, weight, bias, self.eps)
        return ops.rms_norm(x, weight, self.eps)

    def _scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


class HeadNorm(Norm):
    """The norm of each query or key head. A rank has some of the heads and thus of its gradient."""

    def __init__(self, name: str, width: int, spec: ArchSpec, *, place: Placement) -> None:
        super().__init__(name, width, spec, place=place)
        self._group = place.group

    def _scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        copy, bias = self._group.copy, self.bias
        return copy(self.weight), None if bias is None else copy(bias)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": ops.relu,
    "gelu": F.gelu,
    "gelu_tanh": ops.gelu_tanh,
}
