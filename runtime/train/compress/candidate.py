"""A model that was computed, not trained: what its folder will hold, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.families import family_named
from mizzen.runtime.model.names import to_checkpoint
from mizzen.runtime.train.export import published_dtype, write_description


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Tensors, and what config.json says other than the base's: in our words, as `spell` takes."""

    spec: ArchSpec
    weights: Mapping[str, Tensor]  # by our names, whole
    packed: Mapping[str, Tensor] = field(default_factory=dict)  # by the checkpoint's, as they are
    changes: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, *, base_model: Path, tokenizer: Tokenizer) -> None:
        """Write a complete model; weights take the published type, packed ones stay as they are."""
        dtype = published_dtype(self.spec)
        typed = ((name, tensor.to(dtype).contiguous()) for name, tensor in self.weights.items())
        names = family_named(self.spec.family).names
        tensors = to_checkpoint(typed, names, head_dim=self.spec.head_dim) | dict(self.packed)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_description(
            folder,
            spec=self.spec,
            base_model=base_model,
            tokenizer=tokenizer,
            changes=self.changes,
        )
