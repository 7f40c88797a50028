"""The engine's settings. Checked here once, trusted everywhere else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
Quantization = Literal["none", "int8", "int4", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that decides how a model is run. `None` means: chosen from model and machine."""

    model: Path  # a directory in Hugging Face layout, or a .gguf file
    tensor_parallel_size: int = 1
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
