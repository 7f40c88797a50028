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

from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.shard import Span, even_span

_VOCAB_MULTIPLE = 64  # matmuls run best on such widths, and every rank's part must be equal


class WeightSource(Protocol):
    """A checkpoint that gives parts of its tensors by their Hugging Face names."""

    def read(self, name: str, *, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """Return the tensor, or only the named rows (first dimension) or columns (second)."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole tensor's shape; raises WeightsMissingError."""
        ...


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
    """A matrix and an optional bias whose weight may be prepacked for the CPU."""

    def __init__(self, rows: int, columns: int, *, bias: bool, place: Placement) -> None:
        super().__init__()
        self.weight = place.empty(rows, columns)
        self.bias = place.empty(rows) if bias else None
        self._packed: Tensor | None = None

    def matmul(self, x_TI: Tensor, *, bias: bool = True) -> Tensor:
        """Return `x` times the weight, plus the bias unless told not to."""
        addend = self.bias if bias else None
        if self._packed is None:
            return F.linear(x_TI, self.weight, addend)
        return torch.ops.mkldnn._linear_pointwise(x_TI, self._packed, addend, "none", [], "")

    def pack(self, *, keep_weight: bool = False) -> None:
        """Reorder the weight as oneDNN wants it: up to 2x for few tokens, no more training."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
        if not keep_weight:
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


def can_pack(place: Placement) -> bool:
    """Is oneDNN's prepacked linear (a private operator of torch) here and does it know the type?"""
    return (
        place.device.type == "cpu"
        and place.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


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
        self._group = place.group

    def forward(self, x_TI: Tensor, layer: int, lora: LoraDelta | None) -> Tensor:
        """Return the whole output, equal on every rank."""
        # The bias follows the sum: added to each rank's share it would count once per rank.
        is_split = self._group.size > 1
        out_TO = self.matmul(x_TI, bias=not is_split)
        if lora is not None:
            # An adapter is linear too: its shares take part in the same sum.
            delta = lora.delta(layer, self.part.name, x_TI)
            if delta is not None:
                out_TO = out_TO + delta
        out_TO = self._group.all_reduce(out_TO)
        return out_TO + self.bias if is_split and self.bias is not None else out_TO

    def shards(self) -> Iterator[TensorShard]:
        """Yield views of the held part of each checkpoint tensor."""
        path = f"{self.prefix}{self.part.path}"
        whole = (self.rows, self.part.total)
        yield TensorShard(f"{path}.weight", self.weight, whole, columns=self.part.span)
        if self.bias is not None:
            yield TensorShard(f"{path}.bias", self.bias, whole[:1])


class VocabTable(Linear):
    """Token vectors, sharded by token: the embedding, and the output head in its other use.

    The vocabulary is padded so that every rank has the same number of rows; padding is zero.
    """

    def __init__(self, name: str, vocab: int, columns: int, *, place: Placement) -> None:
        multiple = _VOCAB_MULTIPLE * place.group.size
        padded = -(-vocab // multiple) * multiple
        self.span = even_span(padded, rank=place.group.rank, size=place.group.size)
        super().__init__(self.span.size, columns, bias=False, place=place)
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
            return F.embedding(token_ids_T, self.weight)
        local_T = token_ids_T - self.span.start
        is_elsewhere_T = (local_T < 0) | (local_T >= self.span.size)
        vectors = F.embedding(local_T.masked_fill(is_elsewhere_T, 0), self.weight)
        return self._group.all_reduce(vectors.masked_fill(is_elsewhere_T[:, None], 0))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return float32 scores over the whole vocabulary, equal on every rank."""
        local_NV = self.matmul(self._group.copy(hidden_ND))
        return self._group.all_gather(local_NV)[:, : self.vocab].float()

    def shards(self) -> Iterator[TensorShard]:
        """Yield views of the held part of each checkpoint tensor."""
        held, whole = self._held, (self.vocab, self.weight.shape[1])
        yield TensorShard(self.name, self.weight[:held], whole, rows=Span(self.span.start, held))


class RmsNorm(nn.Module):
    """Scale to unit root mean square, then by a learned weight; the same on every rank."""

    def __init__(self, name: str, width: int, eps: float, *, place: Placement) -> None:
        super().__init__()
        self.weight = place.empty(width)
        self.name = name
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def shards(self) -> Iterator[TensorShard]:
        """Yield the one tensor."""
        yield TensorShard(self.name, self.weight, tuple(self.weight.shape))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
