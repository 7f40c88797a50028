"""Settings of `mizzen serve`: every field is a flag and an environment variable."""

import os
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict

from mizzen.runtime.engine.config import Device, Dtype, EngineConfig, Quantization
from mizzen.runtime.parallel.nodes import Nodes, read_secret
from mizzen.runtime.sources.address import Address, parse_address

Port = Annotated[int, Field(ge=0, le=65535)]

# Where the operator mounts the claims that models and adapters live on.
PVC_ROOT = Path("/mnt/pvc")


class ServeConfig(BaseSettings):
    """Serve one model. Flags win over MIZZEN_SERVE_* variables, those over the defaults."""

    model_config = SettingsConfigDict(
        env_prefix="MIZZEN_SERVE_",
        cli_prog_name="mizzen serve",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        protected_namespaces=(),
        extra="forbid",
    )

    model: CliPositionalArg[str] = Field(
        description="Directory in Hugging Face layout, a .gguf file, a file:// address of one, "
        "hf://ORG/NAME[@REVISION] or s3://BUCKET/PREFIX."
    )
    served_model_name: str | None = Field(
        None, min_length=1, description="Name clients ask for; default: the path's last part."
    )
    cache_dir: Path = Field(
        default_factory=lambda: _user_cache() / "mizzen",
        description="Where models from hf:// and s3:// are kept; may be shared by processes.",
    )
    cache_gib: float | None = Field(
        None,
        gt=0,
        description="Most the cache may hold; unused models make room. Default: what the disk has.",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, description="Ranks that each layer of the model is split over."
    )
    pipeline_parallel_size: int = Field(
        1, ge=1, description="Stages the model's layers are cut into, each of so many ranks."
    )
    nnodes: int = Field(
        1, ge=1, description="Pods or machines the ranks are spread over, equally many on each."
    )
    node_rank: int = Field(0, ge=0, description="Place of this one among them; 0 takes requests.")
    master_addr: str | None = Field(
        None, min_length=1, description="Name or address at which all of them reach the first."
    )
    master_port: Port = Field(8003, description="Port of the first on which the others join it.")
    join_seconds: float = Field(
        600.0, gt=0, description="How long they wait for each other once they have their model."
    )
    dtype: Dtype = Field("auto", description="Number format of weights and activations.")
    device: Device = Field("auto", description="Where the model runs.")
    quantization: Quantization = Field(
        "none",
        description="Fewer bits per weight: faster, less exact. fp8 is for GPUs that multiply it.",
    )
    max_model_len: int | None = Field(
        None, ge=2, description="Longest prompt plus answer, in tokens; default: the model's."
    )
    max_num_seqs: int = Field(64, ge=1, description="Sequences that run at once.")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="Tokens computed in one step; default: chosen by device."
    )
    block_size: int = Field(16, ge=1, description="Tokens in one block of the KV cache.")
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="Memory of the KV cache over all ranks; default: chosen from what is free.",
    )
    max_waiting: int = Field(
        512, ge=0, description="Requests that may wait; more are answered 429."
    )
    enforce_eager: bool = Field(
        False, description="Launch every kernel of a step singly on a GPU: no CUDA graphs."
    )
    speculative_tokens: int = Field(
        0, ge=0, le=16, description="Tokens guessed in each step and checked; 0 is off."
    )
    speculative_model: Path | None = Field(
        None,
        description="Small model of the same vocabulary that guesses: a directory or a .gguf file. "
        "Default: guesses come from the text itself.",
    )
    max_loras: int = Field(8, ge=0, description="Adapters that can be loaded at once.")
    max_lora_rank: int = Field(64, ge=1, description="Largest rank an adapter may have.")

    host: str = Field("0.0.0.0", description="Address all three ports listen on.")
    port: Port = Field(8000, description="HTTP: OpenAI and Open Inference Protocol.")
    grpc_port: Port = Field(8001, description="gRPC: Open Inference Protocol.")
    admin_port: Port = Field(8002, description="Health, metrics, drain; not for users.")

    admin_token_file: Path | None = Field(
        None, description="Bearer token of admin calls; without it only loopback may make them."
    )
    api_key_file: Path | None = Field(
        None, description="Bearer keys of users, one a line; without it inference is open."
    )
    adapters_file: Path | None = Field(
        None, description="JSON list of adapters to load before the first request."
    )
    adapter_root: list[Path] = Field(
        default_factory=list,
        description=f"Where adapters and new weights may come from, beside {PVC_ROOT}; repeatable.",
    )
    drain_seconds: float = Field(
        120.0, ge=0, description="How long running requests may take to finish at a stop."
    )
    lame_duck_seconds: float = Field(
        3.0,
        ge=0,
        description="How long new requests are still served after readiness fell at a stop.",
    )
    max_body_mib: float = Field(8.0, gt=0, description="Largest request body; more gets 413.")

    @model_validator(mode="after")
    def _spans_nodes(self) -> Self:
        if self.nnodes > 1:
            if self.tensor_parallel_size * self.pipeline_parallel_size % self.nnodes:
                raise ValueError(
                    "--tensor-parallel-size times --pipeline-parallel-size must be a multiple of "
                    "--nnodes"
                )
            if self.node_rank >= self.nnodes:
                raise ValueError("--node-rank must be less than --nnodes")
            if not (self.master_addr and self.admin_token_file):
                raise ValueError(
                    "--nnodes above 1 needs --master-addr, where the first is reached, and "
                    "--admin-token-file, by which they know each other"
                )
        elif self.node_rank:
            raise ValueError("--node-rank needs --nnodes above 1")
        return self

    @property
    def remote(self) -> Address | None:
        """Where the model is fetched from, None where it lies on this machine."""
        return parse_address(self.model)

    @property
    def model_path(self) -> Path:
        """Where the model lies, whether given as a path or as a file:// address."""
        if self.model.startswith("file://"):
            return Path(unquote(urlsplit(self.model).path))
        return Path(self.model).expanduser()

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        if self.served_model_name:
            return self.served_model_name
        if self.remote:
            return self.remote.name
        path = self.model_path
        return path.stem if path.suffix == ".gguf" else path.resolve().name

    @property
    def max_body_bytes(self) -> int:
        """The body limit in bytes."""
        return int(self.max_body_mib * 2**20)

    @property
    def adapter_roots(self) -> tuple[Path, ...]:
        """Every directory that adapters may come from."""
        return (PVC_ROOT, *self.adapter_root)

    def engine_config(self) -> EngineConfig:
        """Return the part of these settings that the engine runs on."""
        return EngineConfig(
            model=self.model_path,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            nodes=self._nodes(),
            dtype=self.dtype,
            device=self.device,
            quantization=self.quantization,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            kv_cache_gib=self.kv_cache_gib,
            max_waiting=self.max_waiting,
            enforce_eager=self.enforce_eager,
            speculative_tokens=self.speculative_tokens,
            speculative_model=self.speculative_model,
            max_loras=self.max_loras,
            max_lora_rank=self.max_lora_rank,
        )

    def _nodes(self) -> Nodes | None:
        if self.nnodes == 1:
            return None
        assert self.master_addr and self.admin_token_file, "checked above"
        return Nodes(
            count=self.nnodes,
            index=self.node_rank,
            leader=self.master_addr,
            port=self.master_port,
            host=self.host,
            secret=read_secret(self.admin_token_file),
            wait_s=self.join_seconds,
        )


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
