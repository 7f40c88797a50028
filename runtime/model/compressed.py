"""Checkpoints in the layout of compressed-tensors, read as if they had never been compressed.

A compressed matrix `x.weight` is stored as `x.weight_packed` (integers packed into int32 words,
low bits first, each plus half its range) or as `x.weight` in int8 or fp8, beside `x.weight_scale`
and perhaps `x.weight_zero_point`. The scales belong to groups of inputs, to outputs or to the
whole matrix, which their shape tells.

The format knows linear layers alone. Where a family's files hold a matrix as [in, out] (GPT-2),
words and scales belong to outputs all the same, and `x.weight` stays as the family has it, which
is what vLLM's loader of that family expects.

Source: https://github.com/vllm-project/compressed-tensors, formats pack-quantized, int-quantized
and float-quantized.
"""

# Shapes: O and I a matrix's outputs and inputs, G groups of inputs.
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mizzen.runtime.errors import QuantizationUnsupportedError, WeightsMissingError
from mizzen.runtime.model.names import NameMap, WeightSource
from mizzen.runtime.parallel.shard import Span

METHOD = "compressed-tensors"
_WORD_BITS = 32
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized")


def open_compressed(
    config: Mapping[str, Any], source: WeightSource, names: NameMap
) -> WeightSource:
    """Return a source that decompresses what config.json says is compressed.

    Raises:
        QuantizationUnsupportedError: it was compressed in a way we cannot undo.
    """
    rules = config.get("quantization_config")
    if not rules:
        return source
    method, layout = rules.get("quant_method"), rules.get("format")
    if method != METHOD or layout not in _FORMATS:
        raise QuantizationUnsupportedError(
            f"The checkpoint is quantized by {method} in format {layout}. Supported: {METHOD} in "
            f"{', '.join(_FORMATS)}. Use one of those, or the checkpoint it was made from."
        )
    bits = {
        group["weights"]["num_bits"]
        for group in rules.get("config_groups", {}).values()
        if group.get("weights")
    }
    if len(bits) > 1 or not bits <= {4, 8}:
        raise QuantizationUnsupportedError(
            f"The checkpoint stores weights in {sorted(bits)} bits. Supported: 4, or 8, for all."
        )
    return CompressedSource(source, names, bits=bits.pop() if bits else 8)


class CompressedSource:
    """Gives the float tensors behind compressed ones, and others as they are."""

    def __init__(self, source: WeightSource, names: NameMap, *, bits: int) -> None:
        self._source = source
        self._names = names
        self._bits = bits

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole tensor's shape; raises WeightsMissingError."""
        if not self._has(f"{name}_packed"):
            return self._source.shape(name)
        shape = tuple(self._source.read(f"{name}_shape").tolist())
        return shape[::-1] if self._names.is_transposed(name) else shape

    def read(self, name: str, *, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """Return the tensor, or only the named rows or columns."""
        if not self._has(f"{name}_scale"):
            return self._source.read(name, rows=rows, columns=columns)
        if self._names.is_transposed(name):
            return self._matrix(name, rows=columns, columns=rows).T
        return self._matrix(name, rows=rows, columns=columns)

    def _matrix(self, name: str, *, rows: Span | None, columns: Span | None) -> Tensor:
        levels_OI = self._levels(name, rows).float()
        width = levels_OI.shape[1]
        scale_OG = self._beside(f"{name}_scale", rows).float()
        if self._has(f"{name}_zero_point"):
            levels_OI = levels_OI - self._zeros(name, rows, width)
        weight_OI = levels_OI * _per_input(scale_OG, width)
        return weight_OI if columns is None else weight_OI[:, columns.start : columns.stop]

    def _levels(self, name: str, rows: Span | None) -> Tensor:
        if self._has(f"{name}_packed"):
            _, width = self._source.read(f"{name}_shape").tolist()
            words = self._source.read(f"{name}_packed", rows=rows)
            return unpack_words(words, bits=self._bits)[:, :width]
        if self._names.is_transposed(name):
            return self._source.read(name, columns=rows).T
        return self._source.read(name, rows=rows)

    def _beside(self, name: str, rows: Span | None) -> Tensor:
        """Read what belongs to these outputs; what is the whole matrix's has no rows to choose."""
        is_by_output = math.prod(self._source.shape(name)) > 1
        return self._source.read(name, rows=rows if is_by_output else None)

    def _zeros(self, name: str, rows: Span | None, width: int) -> Tensor:
        zeros = self._beside(f"{name}_zero_point", rows)
        if zeros.dtype == torch.int32:
            raise QuantizationUnsupportedError(
                f"{name} has packed zero points. Supported: symmetric quantization. Quantize the "
                "original checkpoint with symmetric: true."
            )
        return _per_input(zeros.float(), width)

    def _has(self, name: str) -> bool:
        try:
            self._source.shape(name)
        except WeightsMissingError:
            return False
        return True


def _per_input(scale_OG: Tensor, width: int) -> Tensor:
    """Return the scale of each weight: of its group, its output or the whole matrix."""
    if scale_OG.ndim < 2 or scale_OG.shape[1] == 1:
        return scale_OG.reshape(-1, 1)
    groups = scale_OG.shape[1]
    return scale_OG.repeat_interleave(-(-width // groups), dim=1)[:, :width]


def unpack_words(words: Tensor, *, bits: int) -> Tensor:
    """Return signed integers as int8, from int32 words of several along the inputs."""
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    levels = (words[..., None] >> shifts) & (2**bits - 1)
    return (levels.flatten(-2) - 2 ** (bits - 1)).to(torch.int8)


def pack_words(levels_OI: Tensor, *, bits: int) -> Tensor:
    """Return the words that `unpack_words` reads; rows are padded with zero levels."""
    per_word = _WORD_BITS // bits
    unsigned = levels_OI.to(torch.int64) + 2 ** (bits - 1)
    padding = -unsigned.shape[1] % per_word
    unsigned = torch.nn.functional.pad(unsigned, (0, padding)).unflatten(1, (-1, per_word))
    shifts = torch.arange(0, _WORD_BITS, bits, device=unsigned.device)
    words = (unsigned << shifts).sum(-1)
    # Two's complement: the sum is an unsigned 32-bit number, the file holds signed ones.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
