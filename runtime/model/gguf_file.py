"""A GGUF file as a source of weights, under llama.cpp's names."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from mizzen.runtime.errors import NotAModelError, UnknownArchitectureError, WeightsMissingError
from mizzen.runtime.model.arch import ArchSpec, RopeSpec
from mizzen.runtime.model.families import GGUF_FAMILIES, GGUF_NAMES, Family
from mizzen.runtime.model.gguf_header import GgufTensor, read_gguf_header
from mizzen.runtime.model.names import NameMap
from mizzen.runtime.parallel.shard import Span


class GgufFile:
    """Gives tensors by llama.cpp's names, dequantized to float32, rotary rows in our order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        header = read_gguf_header(path)
        self.metadata, self._tensors = header.metadata, header.tensors
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        self._spec = self._read_spec()

    def spec(self) -> ArchSpec:
        """Return the description that the file's metadata gives."""
        return self._spec

    def read(self, name: str, *, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """Return the tensor, or only the named rows or columns."""
        tensor = self._tensor(name)
        span = rows or Span(0, tensor.shape[0])
        values = torch.from_numpy(self._dequantize(tensor, span))
        if self._spec.family == "llama" and re.search(r"\.attn_[qk]\.", name):
            values = _unpermute(values, self._spec.head_dim)
        return values if columns is None else values[:, columns.start : columns.stop]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole tensor's shape."""
        return self._tensor(name).shape

    def _tensor(self, name: str) -> GgufTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise WeightsMissingError(f"{self._path.name} has no tensor {name}.")
        return tensor

    def _dequantize(self, tensor: GgufTensor, rows: Span) -> np.ndarray:
        if len(tensor.shape) == 1:  # a vector is one row, and quantizers leave it alone
            return self._rows(tensor, Span(0, 1)).reshape(-1)[rows.start : rows.stop]
        return self._rows(tensor, rows)

    def _rows(self, tensor: GgufTensor, rows: Span) -> np.ndarray:
        start = tensor.offset + rows.start * tensor.row_bytes
        raw = self._data[start : start + rows.size * tensor.row_bytes]
        raw = raw.reshape(rows.size, tensor.row_bytes)
        if tensor.quantization == GGMLQuantizationType.F32:
            return raw.view(np.float32).copy()
        if tensor.quantization == GGMLQuantizationType.F16:
            return raw.view(np.float16).astype(np.float32)
        values: np.ndarray = dequantize(raw, tensor.quantization)
        return values

    def names(self) -> NameMap:
        """Return how the file spells our tensors; llama.cpp fuses where the family's files do."""
        is_fused = "blk.0.attn_qkv.weight" in self._tensors
        return replace(GGUF_NAMES, fused="attn_qkv" if is_fused else None)

    def _read_spec(self) -> ArchSpec:
        name = self.metadata.get("general.architecture")
        if name not in GGUF_FAMILIES:
            raise UnknownArchitectureError(
                f"GGUF architecture {name} is not supported. Supported: {', '.join(GGUF_FAMILIES)}."
            )
        try:
            return self._build_spec(GGUF_FAMILIES[name])
        except KeyError as missing:
            raise NotAModelError(f"{self._path.name} lacks the entry {missing}.") from None

    def _build_spec(self, family: Family) -> ArchSpec:
        def entry(key: str, default: Any = None) -> Any:
            key = f"{family.name}.{key}"
            return self.metadata[key] if default is None else self.metadata.get(key, default)

        heads, hidden_size = entry("attention.head_count"), entry("embedding_length")
        head_dim = entry("attention.key_length", hidden_size // heads)
        if entry("rope.dimension_count", head_dim) != head_dim:
            raise UnknownArchitectureError(
                "Rotary positions on a part of each head are not supported."
            )
        is_float32 = self.metadata.get("general.file_type") == 0
        is_layer_norm = family.fixed.get("norm") == "layer"
        fields = {
            "qkv_bias": "blk.0.attn_q.bias" in self._tensors,
            "o_bias": "blk.0.attn_output.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._tensors,
            "qk_norm": "blk.0.attn_q_norm.weight" in self._tensors,
            # Of those that llama.cpp has, the families with layer norms use this activation.
            "act": "gelu_tanh" if is_layer_norm else "silu",
            **family.fixed,
        }
        return ArchSpec(
            family=family.name,
            vocab_size=self._tensors["token_embd.weight"].shape[0],
            hidden_size=hidden_size,
            intermediate_size=entry("feed_forward_length"),
            layers=entry("block_count"),
            heads=heads,
            kv_heads=entry("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_len=entry("context_length"),
            norm_eps=entry(f"attention.layer_norm{'' if is_layer_norm else '_rms'}_epsilon"),
            rope=self._rope(entry),
            tied="output.weight" not in self._tensors,
            dtype=torch.float32 if is_float32 else torch.bfloat16,
            bos_id=self.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_ids=self._eos_ids(),
            **fields,
        )

    def _rope(self, entry: Any) -> RopeSpec:
        theta = entry("rope.freq_base", 10_000.0)
        if "rope_freqs.weight" in self._tensors:
            factors = self._rows(self._tensors["rope_freqs.weight"], Span(0, 1))[0]
            return RopeSpec(theta=theta, scaling="factors", factors=tuple(factors.tolist()))
        kind = entry("rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise UnknownArchitectureError(f"Rotary scaling {kind} is not supported.")
        return RopeSpec(theta=theta, scaling=kind, factor=entry("rope.scaling.factor", 1.0))

    def _eos_ids(self) -> tuple[int, ...]:
        names = ("eos", "eot", "eom")  # end of text, of turn, of message
        ids = (self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names)
        return tuple(dict.fromkeys(i for i in ids if i is not None))


def _unpermute(values: Tensor, head_dim: int) -> Tensor:
    """Undo llama.cpp's pairing of rotary dimensions: (i, i + 1) back to (i, i + d/2).

    Source: llama.cpp, `convert_hf_to_gguf.py`, `LlamaModel.permute`.
    """
    pairs = values.view(-1, head_dim // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
