"""Settings of the gateway: flags of `mizzen gateway`, environment MIZZEN_GATEWAY_*."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_HEALTH_PORT = 8002
_LOCAL_HEALTH_PORT = 8082


class GatewayConfig(BaseSettings):
    """Front door of the cluster, or of a laptop when `upstream` names the runtimes."""

    model_config = SettingsConfigDict(
        env_prefix="MIZZEN_GATEWAY_",
        cli_kebab_case=True,
        cli_prog_name="mizzen gateway",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        extra="forbid",
    )

    host: str = Field("0.0.0.0", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port of the OpenAI API.")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of metrics and health; 8002, but 8082 with --upstream, where a runtime "
        "beside it has 8002.",
    )
    upstream: list[str] = Field(
        default_factory=list,
        description="NAME=URL of a runtime, repeated: serve these and ask no Kubernetes.",
    )
    auth: Literal["on", "off"] = Field("on", description="Whether clients must send an API key.")
    keys_file: Path | None = Field(
        None,
        description="API keys without Kubernetes: lines of `ID sha256:SALT:HASH` and "
        "perhaps the key's limits, as `mizzen keys create` prints them.",
    )
    namespace: str | None = Field(
        None, description="Namespace of the API key Secrets; the pod's own when not set."
    )
    watch_namespaces: list[str] = Field(
        default_factory=list, description="Namespaces to serve models of; all when empty."
    )
    kubeconfig: Path | None = Field(
        None, description="Cluster access from outside a pod; ~/.kube/config when not set."
    )
    max_body_mib: int = Field(16, ge=1, le=1024, description="Largest request body in MiB.")
    max_answer_mib: int = Field(64, ge=1, le=4096, description="Longest answer in MiB.")
    max_connections: int = Field(
        20000, ge=1, description="Above this many connections the longest idle ones are closed."
    )
    header_timeout_s: float = Field(
        15.0, gt=0, description="Time a new connection has to send its first request's headers."
    )
    idle_timeout_s: float = Field(
        75.0, gt=0, description="How long a connection may stay open between two requests."
    )
    stall_timeout_s: float = Field(
        300.0, gt=0, description="How long a client may read nothing of its answer."
    )
    body_timeout_s: float = Field(60.0, gt=0, description="Time a client has to send its body.")
    connect_timeout_s: float = Field(3.0, gt=0, description="Time to connect to a replica.")
    read_timeout_s: float = Field(
        600.0, gt=0, description="Longest silence of a replica before the request is given up."
    )
    retry_window_s: float = Field(
        10.0, ge=0, description="How long a request that failed unseen keeps looking for a replica."
    )
    max_resends: int = Field(
        2, ge=0, description="How often a request is sent again after a replica died with it."
    )
    eject_s: float = Field(
        5.0, ge=0, description="How long a replica that failed is passed over; longer each time."
    )
    max_ejected_ratio: float = Field(
        0.5, ge=0, le=1, description="Largest share of a model's replicas that is passed over."
    )
    load_factor: float = Field(
        1.25,
        gt=1,
        le=100,
        description="How far above the mean a replica's requests may be before prompts that "
        "belong to it go elsewhere.",
    )
    hold_timeout_s: float = Field(
        300.0, ge=0, description="How long a request waits for a model that is starting; 0: not."
    )
    queue_timeout_s: float = Field(
        30.0, ge=0, description="How long a request waits while all replicas are busy; 0: not."
    )
    max_waiting: int = Field(1000, ge=1, description="Most requests that wait at one time.")
    max_waiting_mib: int = Field(
        256, ge=1, description="Most MiB of requests that wait at one time."
    )
    replica_requests: int = Field(
        256,
        ge=1,
        description="Most requests this gateway gives one replica; further ones wait here, where "
        "their order is fair.",
    )
    progress_s: float = Field(
        5.0, gt=0, description="How often a waiting stream is told that it still waits."
    )
    batches_dir: Path | None = Field(
        None,
        description="Folder for files and batches, the same for all gateways; none: they are off.",
    )
    batches_parallel: int = Field(
        8, ge=1, le=1000, description="Most requests of batches that run at one time."
    )
    batches_max_file_mib: int = Field(100, ge=1, description="Largest file in MiB.")
    batches_max_lines: int = Field(50000, ge=1, description="Most lines of a batch.")
    batches_keep_days: int = Field(
        30, ge=1, description="After this long files and ended batches are removed."
    )
    lame_duck_s: float = Field(
        5.0, ge=0, description="On SIGTERM: still accept for this long, while endpoints forget us."
    )
    drain_s: float = Field(
        120.0, ge=0, description="On SIGTERM: time for open requests to end after that."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines to print."
    )

    @field_validator("upstream")
    @classmethod
    def _check_upstream(cls, entries: list[str]) -> list[str]:
        for entry in entries:
            name, _, url = entry.partition("=")
            if not name or not url.startswith(("http://", "https://")):
                raise ValueError(
                    f"{entry!r} is not NAME=URL; write it as smollm2=http://127.0.0.1:8000"
                )
        return entries

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.upstream and self.auth == "on" and self.keys_file is None:
            raise ValueError(
                "Without Kubernetes there are no key Secrets: add --keys-file PATH, or --auth off."
            )
        return self

    @property
    def health_port(self) -> int:
        """Port of metrics and health."""
        if self.metrics_port is not None:
            return self.metrics_port
        return _LOCAL_HEALTH_PORT if self.upstream else _HEALTH_PORT

    @property
    def upstreams(self) -> list[tuple[str, str]]:
        """The upstream entries as (model name, base URL)."""
        return [
            (name, url.rstrip("/")) for name, _, url in (e.partition("=") for e in self.upstream)
        ]
