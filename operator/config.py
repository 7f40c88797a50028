"""The operator's settings, from MIZZEN_* variables."""

import socket
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class OperatorConfig(BaseSettings):
    """Everything an installation can set; the chart writes the variables."""

    model_config = SettingsConfigDict(env_prefix="MIZZEN_", frozen=True)

    namespace: str = Field("mizzen-system", description="Where the operator itself runs.")
    identity: str = Field(
        default_factory=socket.gethostname, description="Name in the Lease, the pod's name."
    )
    watch_namespaces: list[str] = Field(
        default_factory=list, description="Namespaces to serve; all when empty."
    )
    runtime_image: str = Field(
        "mizzen-runtime:latest", description="Image of runtime and trainer pods."
    )
    image_pull_policy: str = Field("IfNotPresent", description="Pull policy of that image.")
    image_pull_secrets: list[str] = Field(
        default_factory=list, description="Secrets for its registry, in the pods' namespaces."
    )
    admin_secret: str = Field("mizzen-admin", description="Secret with the admin token.")
    admin_token_file: Path = Field(
        Path("/var/run/mizzen/admin/token"), description="That token, mounted in this pod."
    )
    gateway_url: str = Field(
        "", description="Gateway that trainers ask a judge through, such as http://mizzen-gateway."
    )
    cluster_domain: str = Field("cluster.local", description="DNS domain of the cluster.")

    parent_gateway: str = Field(
        "",
        description="Gateway (gateway.networking.k8s.io) to attach an HTTPRoute of each deployment "
        "to; empty: none is made.",
    )
    parent_gateway_namespace: str = Field(
        "", description="Its namespace; the deployment's own when empty."
    )
    parent_gateway_section: str = Field(
        "", description="The one listener of it to attach to; all when empty."
    )
    endpoint_picker: str = Field(
        "",
        description="Endpoint picker's Service in a deployment's namespace, for an InferencePool "
        "of each; {deployment} stands for the deployment's name. Empty: none is made.",
    )
    endpoint_picker_port: int = Field(9002, ge=1, le=65535, description="Port of that Service.")

    workers: int = Field(32, ge=1, description="Reconciles at the same time.")
    resync_s: float = Field(300.0, gt=0, description="Between two full relists.")
    autoscale_s: float = Field(5.0, gt=0, description="Between two looks of the autoscaler.")
    lending_s: float = Field(5.0, gt=0, description="Between two looks at who holds devices.")
    gateway_api_s: float = Field(
        30.0, gt=0, description="Between two looks at which kinds of the Gateway API exist."
    )
    prometheus_url: str = Field(
        "",
        description="Prometheus to read the load from, such as http://prometheus:9090; empty: "
        "the operator scrapes gateways and runtimes itself.",
    )
    metrics_interval_s: float = Field(
        5.0, gt=0, description="Between two scrapes of a target; three missed ones are unknown."
    )
    otlp_endpoint: str = Field(
        "",
        description="Collector that runtimes send traces to by OTLP over HTTP, such as "
        "http://otel-collector:4318; empty: none.",
    )
    health_host: str = "0.0.0.0"
    health_port: int = Field(8002, ge=0, description="/healthz, /readyz and /metrics.")
    stuck_after_s: float = Field(
        120.0,
        gt=0,
        description="/healthz fails when a due key waited this long, or a reconcile takes so much "
        "longer than its longest call may.",
    )

    lease_name: str = "mizzen-operator"
    lease_duration_s: float = Field(15.0, gt=0)
    lease_renew_s: float = Field(10.0, gt=0, description="Give up leading after this long.")
    lease_retry_s: float = Field(2.0, gt=0)
    shutdown_s: float = Field(20.0, gt=0, description="For running reconciles to end.")

    log_format: str = Field("json", pattern="^(json|plain)$")
    log_level: str = "INFO"
