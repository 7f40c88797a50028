"""The engine's settings. Checked here once, trusted everywhere else."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mizzen.runtime.parallel.nodes import Nodes

Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
Quantization = Literal["none", "int8", "int4", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that decides how a model is run. `None` means: chosen from model and machine."""

    model: Path  # a directory in Hugging Face layout, or a .gguf file
    tensor_parallel_size: int = 1  # ranks of a stage
    pipeline_parallel_size: int = 1  # stages
    dtype: Dtype = "auto"
    device: Device = "auto"
    quantization: Quantization = "none"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None  # token budget of a step
    block_size: int = 16
    kv_cache_gib: float | None = None
    max_waiting: int = 512
    max_waiting_tokens: int = 1_000_000
    max_loras: int = 8
    max_lora_rank: int = 64
    enable_prefix_caching: bool = True
    cpu_threads: int | None = None  # per rank; None reads the cgroup's quota
    heartbeat_limit_s: float = 60.0  # a step may take this long before the loop counts as dead
    enforce_eager: bool = False  # no CUDA graphs
    speculative_tokens: int = 0  # guessed and checked, in each step
    speculative_model: Path | None = None  # guesses; without, the text itself does
    seed: int = 0
    nodes: Nodes | None = None  # the pods the ranks are spread over, where there are several

    @property
    def ranks(self) -> int:
        """How many ranks hold the model between them."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def ranks_per_pod(self) -> int:
        """How many ranks share this pod's processors and memory."""
        return self.ranks // (self.nodes.count if self.nodes else 1)

    @property
    def agreement(self) -> str:
        """A digest of what must be equal in all pods of a group."""
        alike = replace(self, model=Path(), cpu_threads=None, nodes=None)
        return hashlib.sha256(repr(alike).encode()).hexdigest()
