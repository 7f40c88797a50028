"""A GGUF file as a source of weights: llama.cpp's names and row order turned into ours."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from mizzen.runtime.errors import NotAModelError, UnknownArchitectureError, WeightsMissingError
from mizzen.runtime.model.arch import ArchSpec, RopeSpec
from mizzen.runtime.model.gguf_header import GgufTensor, read_gguf_header
from mizzen.runtime.parallel.shard import Span

_FAMILIES = ("llama", "qwen2", "qwen3")  # Mistral's files say "llama" too
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class GgufFile:
    """Gives tensors by their Hugging Face names, dequantized to float32."""

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
        if self._spec.family == "llama" and re.search(r"\.[qk]_proj\.", name):
            values = _unpermute(values, self._spec.head_dim)
        return values if columns is None else values[:, columns.start : columns.stop]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole tensor's shape."""
        return self._tensor(name).shape

    def _tensor(self, name: str) -> GgufTensor:
        tensor = self._tensors.get(_gguf_name(name))
        if tensor is None:
            raise WeightsMissingError(f"{self._path.name} has no tensor {_gguf_name(name)}.")
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

    def _read_spec(self) -> ArchSpec:
        family = self.metadata.get("general.architecture")
        if family not in _FAMILIES:
            raise UnknownArchitectureError(
                f"GGUF architecture {family} is not supported. Supported: {', '.join(_FAMILIES)}."
            )
        try:
            return self._build_spec(family)
        except KeyError as missing:
            raise NotAModelError(f"{self._path.name} lacks the entry {missing}.") from None

    def _build_spec(self, family: str) -> ArchSpec:
        def entry(key: str, default: Any = None) -> Any:
            key = f"{family}.{key}"
            return self.metadata[key] if default is None else self.metadata.get(key, default)

        heads, hidden_size = entry("attention.head_count"), entry("embedding_length")
        head_dim = entry("attention.key_length", hidden_size // heads)
        if entry("rope.dimension_count", head_dim) != head_dim:
            raise UnknownArchitectureError(
                "Rotary positions on a part of each head are not supported."
            )
        is_float32 = self.metadata.get("general.file_type") == 0
        return ArchSpec(
            family=family,
            vocab_size=self._tensors["token_embd.weight"].shape[0],
            hidden_size=hidden_size,
            intermediate_size=entry("feed_forward_length"),
            layers=entry("block_count"),
            heads=heads,
            kv_heads=entry("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_len=entry("context_length"),
            norm_eps=entry("attention.layer_norm_rms_epsilon"),
            rope=self._rope(entry),
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            o_bias="blk.0.attn_output.bias" in self._tensors,
            mlp_bias="blk.0.ffn_up.bias" in self._tensors,
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
            tied="output.weight" not in self._tensors,
            dtype=torch.float32 if is_float32 else torch.bfloat16,
            bos_id=self.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_ids=self._eos_ids(),
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


def _gguf_name(name: str) -> str:
    if found := _LAYER_NAME.fullmatch(name):
        layer, path, kind = found.groups()
        return f"blk.{layer}.{_IN_LAYER[path]}.{kind}"
    return _TOP[name]


def _unpermute(values: Tensor, head_dim: int) -> Tensor:
    """Undo llama.cpp's pairing of rotary dimensions: (i, i + 1) back to (i, i + d/2).

    Source: llama.cpp, `convert_hf_to_gguf.py`, `LlamaModel.permute`.
    """
    pairs = values.view(-1, head_dim // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
