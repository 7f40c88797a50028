"""A model that was computed, not trained: what its folder will hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.export import published_dtype, write_description

# Families whose checkpoints call their tensors as we do and hold each matrix by itself.
_PLAIN = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Tensors by the checkpoint's names, and what its config.json says other than the base's."""

    spec: ArchSpec
    tensors: Mapping[str, Tensor]
    changes: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, *, base_model: Path, tokenizer: Tokenizer) -> None:
        """Write a complete model; weights take the published type, packed ones stay as they are."""
        dtype = published_dtype(self.spec)
        tensors = {
            name: (tensor.to(dtype) if tensor.dtype.itemsize == 4 and tensor.is_floating_point()
                   else tensor).contiguous()
            for name, tensor in self.tensors.items()
        }  # fmt: skip
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_description(
            folder,
            spec=self.spec,
            base_model=base_model,
            tokenizer=tokenizer,
            changes=self.changes,
        )


def check_plain(decoder: Decoder, method: str) -> None:
    """Refuse families that fuse what we would cut.

    Raises:
        JobConfigError: naming the families that can be taken.
    """
    family = decoder.spec.family
    if family not in _PLAIN:
        raise JobConfigError(
            f"Method {method} takes models of the families {', '.join(_PLAIN)}, and the base is "
            f"{family}. Choose another base model."
        )
