"""The chart's values: one model, from which values.yaml, its schema and the table are made."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

JsonObject = dict[str, object]


class Values(BaseModel):
    """Base of every table of values: an unknown key is an error at install time."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Image(Values):
    """One of our two images."""

    repository: str = Field(
        min_length=1, description="Image name, with its registry if not the default one."
    )
    tag: str = Field("", description="Tag; the chart's appVersion when empty.")
    digest: str = Field(
        "",
        pattern=r"^(sha256:[0-9a-f]{64})?$",
        description="Digest to pin, sha256:...; wins over the tag.",
    )


class Images(Values):
    """Where pods get their images."""

    control: Image = Field(
        default_factory=lambda: Image(repository="mizzen/control"),
        description="Operator and gateway.",
    )
    runtime: Image = Field(
        default_factory=lambda: Image(repository="mizzen/runtime"),
        description="Runtime and trainer pods, which the operator makes.",
    )
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", alias="pullPolicy", description="Pull policy of both."
    )
    pull_secrets: list[str] = Field(
        default_factory=list,
        alias="pullSecrets",
        description="Names of registry Secrets; they must exist in the models' namespaces too.",
    )


class Crds(Values):
    """The CustomResourceDefinitions."""

    install: bool = Field(True, description="Install and upgrade them with the chart.")
    keep: bool = Field(
        True, description="Keep them, and with them every model and job, on uninstall."
    )


class ResourceAmounts(Values):
    """Amounts by resource name."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    __pydantic_extra__: dict[str, str | int | float]


class Resources(Values):
    """Requests and limits of a container."""

    requests: ResourceAmounts = Field(default_factory=ResourceAmounts, description="Requests.")
    limits: ResourceAmounts = Field(default_factory=ResourceAmounts, description="Limits.")


class Pods(Values):
    """What both Deployments of the chart have in common."""

    replicas: int = Field(2, ge=0, le=100, description="Number of pods.")
    node_selector: dict[str, str] = Field(
        default_factory=dict, alias="nodeSelector", description="Labels a node must have."
    )
    tolerations: list[JsonObject] = Field(
        default_factory=list, description="Taints to tolerate, as in a pod."
    )
    affinity: JsonObject = Field(default_factory=dict, description="Affinity, as in a pod.")
    priority_class_name: str = Field(
        "", alias="priorityClassName", description="Priority class of the pods."
    )
    pod_annotations: dict[str, str] = Field(
        default_factory=dict, alias="podAnnotations", description="Annotations of the pods."
    )
    pod_labels: dict[str, str] = Field(
        default_factory=dict, alias="podLabels", description="More labels of the pods."
    )


class Operator(Pods):
    """The operator: makes pods, services and adapters follow from your resources."""

    replicas: int = Field(2, ge=0, le=100, description="One leads, the others stand by.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", alias="logLevel", description="Least severe log lines to print."
    )
    log_format: Literal["json", "plain"] = Field(
        "json", alias="logFormat", description="Form of the log lines."
    )
    workers: int = Field(32, ge=1, le=256, description="Resources reconciled at the same time.")
    prometheus_url: str = Field(
        "",
        pattern=r"^(https?://.+)?$",
        alias="prometheusUrl",
        description="Prometheus that autoscaling reads the load from, such as "
        "http://prometheus.monitoring:9090; empty: the operator scrapes gateways and runtimes.",
    )
    metrics_interval_seconds: int = Field(
        5,
        ge=1,
        le=60,
        alias="metricsIntervalSeconds",
        description="Between two scrapes of the load; with prometheusUrl, your scrape interval.",
    )
    resources: Resources = Field(
        default_factory=lambda: _resources(cpu="100m", memory="128Mi", memory_limit="1Gi"),
        description="Requests and limits of the container.",
    )


class GatewayAuth(Values):
    """Who may use the models."""

    enabled: bool = Field(
        True, description="Ask for an API key; make one with `mizzen keys create NAME`."
    )


class GatewayService(Values):
    """The gateway's address."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        "ClusterIP", description="Type of the Service."
    )
    port: int = Field(8080, ge=1, le=65535, description="Port of the OpenAI API.")
    annotations: dict[str, str] = Field(
        default_factory=dict, description="Annotations, such as a load balancer's settings."
    )


class GatewayBatches(Values):
    """OpenAI's files and batches."""

    volume: str = Field(
        "",
        description="PersistentVolumeClaim in the release's namespace to keep them in, "
        "ReadWriteMany where the gateway has several pods; empty: they are off.",
    )
    parallel: int = Field(
        8, ge=1, le=1000, description="Most requests of batches that one pod runs at one time."
    )
    max_file_mib: int = Field(100, ge=1, alias="maxFileMiB", description="Largest file in MiB.")
    max_lines: int = Field(50000, ge=1, alias="maxLines", description="Most lines of a batch.")
    keep_days: int = Field(
        30,
        ge=1,
        alias="keepDays",
        description="After this long files and ended batches are removed.",
    )


class Gateway(Pods):
    """The gateway: the one OpenAI-compatible address of every model."""

    replicas: int = Field(2, ge=0, le=100, description="Number of pods; they share nothing.")
    auth: GatewayAuth = Field(default_factory=GatewayAuth, description="Who may use the models.")
    service: GatewayService = Field(
        default_factory=GatewayService, description="The gateway's address."
    )
    max_body_mib: int = Field(
        16, ge=1, le=1024, alias="maxBodyMiB", description="Largest request body in MiB."
    )
    max_answer_mib: int = Field(
        64, ge=1, le=4096, alias="maxAnswerMiB", description="Longest answer in MiB."
    )
    read_timeout_seconds: int = Field(
        600,
        ge=1,
        alias="readTimeoutSeconds",
        description="Longest silence of a replica before a request is given up.",
    )
    hold_timeout_seconds: int = Field(
        300,
        ge=0,
        alias="holdTimeoutSeconds",
        description="How long a request waits for a model that is starting; 0: not at all.",
    )
    queue_timeout_seconds: int = Field(
        30,
        ge=0,
        alias="queueTimeoutSeconds",
        description="How long a request waits while all replicas are busy; 0: not at all.",
    )
    max_waiting: int = Field(
        1000, ge=1, alias="maxWaiting", description="Most requests that wait in one pod."
    )
    batches: GatewayBatches = Field(
        default_factory=GatewayBatches, description="OpenAI's files and batches."
    )
    lame_duck_seconds: int = Field(
        5,
        ge=0,
        alias="lameDuckSeconds",
        description="A leaving pod still accepts for this long, while load balancers forget it.",
    )
    drain_seconds: int = Field(
        120, ge=0, alias="drainSeconds", description="Time a leaving pod gives open requests."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", alias="logLevel", description="Least severe log lines to print."
    )
    resources: Resources = Field(
        default_factory=lambda: _resources(cpu="100m", memory="128Mi", memory_limit="1Gi"),
        description="Requests and limits of the container.",
    )


class ParentRef(Values):
    """Where HTTPRoutes attach."""

    name: str = Field("", description="Name of a Gateway; empty: no HTTPRoute is made.")
    namespace: str = Field("", description="Its namespace; the deployment's own when empty.")
    section_name: str = Field(
        "",
        alias="sectionName",
        description="The one listener of it to attach to; all when empty.",
    )


class PickerRef(Values):
    """Who chooses among the replicas of an InferencePool."""

    name: str = Field(
        "",
        description="Name of a Service in the deployment's namespace, such as {deployment}-epp; "
        "empty: no InferencePool is made.",
    )
    port: int = Field(9002, ge=1, le=65535, description="Port of that Service.")


class GatewayApi(Values):
    """The cluster's own Gateway API, as a second way to the models beside our gateway."""

    parent_ref: ParentRef = Field(
        default_factory=ParentRef,
        alias="parentRef",
        description="Gateway to attach an HTTPRoute of each deployment to.",
    )
    endpoint_picker: PickerRef = Field(
        default_factory=PickerRef,
        alias="endpointPicker",
        description="Endpoint picker of an InferencePool of each deployment.",
    )


class AdminToken(Values):
    """The token by which the operator talks to runtimes and trainers (Secret mizzen-admin)."""

    source: Literal["Chart", "Job", "Existing"] = Field(
        "Chart",
        description="Chart: Helm makes it once and keeps it. Job: a Job makes it in the cluster, "
        "for tools that only render. Existing: you make the Secret, with a key `token`.",
    )


class Rbac(Values):
    """Roles."""

    aggregate: bool = Field(
        True, description="Add models and jobs to the cluster's own roles view, edit and admin."
    )


class NetworkPolicy(Values):
    """Who may reach the chart's pods."""

    enabled: bool = Field(True, description="Let only what is needed in.")
    metrics_from: list[JsonObject] = Field(
        default_factory=lambda: _from_anywhere(),
        alias="metricsFrom",
        description="Peers that may read metrics, as in a NetworkPolicy.",
    )


class DisruptionBudget(Values):
    """What node drains may do to the chart's pods."""

    enabled: bool = Field(True, description="One pod at a time, where there are several.")


class PodMonitor(Values):
    """Scraping by the Prometheus operator."""

    enabled: bool = Field(False, description="Make PodMonitors; needs monitoring.coreos.com/v1.")
    labels: dict[str, str] = Field(
        default_factory=dict, description="Labels your Prometheus selects PodMonitors by."
    )
    interval_seconds: int = Field(
        15, ge=1, alias="intervalSeconds", description="Time between two scrapes."
    )


class Metrics(Values):
    """Metrics; every pod serves them on port 8002 in any case."""

    pod_monitor: PodMonitor = Field(
        default_factory=PodMonitor, alias="podMonitor", description="The Prometheus operator's."
    )


class Tracing(Values):
    """Traces of requests, by OpenTelemetry."""

    endpoint: str = Field(
        "",
        pattern=r"^(https?://.+)?$",
        description="Collector that gateways and runtimes send spans to by OTLP over HTTP, such as "
        "http://otel-collector.monitoring:4318; empty: none. A change rolls out every model.",
    )


class Test(Values):
    """`helm test`: tokens from a model on the CPU, or a message that says what to set."""

    model: str = Field(
        "",
        pattern=r"^((pvc|file)://.+)?$",
        description="Model source to serve and ask, such as pvc://models/smollm2 with the claim "
        "in the release's namespace.",
    )
    served_model: str = Field(
        "",
        alias="servedModel",
        description="Or: name of a model that is served already, such as quickstart/smollm2.",
    )
    timeout_seconds: int = Field(
        300, ge=10, alias="timeoutSeconds", description="Time for all of it."
    )


class ChartValues(Values):
    """Settings of Mizzen's chart."""

    image: Images = Field(default_factory=Images, description="Images.")
    crds: Crds = Field(default_factory=Crds, description="The CustomResourceDefinitions.")
    watch_namespaces: list[str] = Field(
        default_factory=list,
        alias="watchNamespaces",
        description="Namespaces to work in, with Roles there instead of a ClusterRole; all when "
        "empty. They must exist.",
    )
    cluster_domain: str = Field(
        "cluster.local", alias="clusterDomain", description="DNS domain of the cluster."
    )
    operator: Operator = Field(default_factory=Operator, description="The operator.")
    gateway: Gateway = Field(default_factory=Gateway, description="The gateway.")
    gateway_api: GatewayApi = Field(
        default_factory=GatewayApi,
        alias="gatewayApi",
        description="The cluster's own Gateway API; what is named is made once its CRDs exist.",
    )
    admin_token: AdminToken = Field(
        default_factory=AdminToken,
        alias="adminToken",
        description="The token between operator, runtimes and trainers.",
    )
    rbac: Rbac = Field(default_factory=Rbac, description="Roles.")
    network_policy: NetworkPolicy = Field(
        default_factory=NetworkPolicy,
        alias="networkPolicy",
        description="Who may reach the chart's pods.",
    )
    pod_disruption_budget: DisruptionBudget = Field(
        default_factory=DisruptionBudget,
        alias="podDisruptionBudget",
        description="What node drains may do to the chart's pods.",
    )
    metrics: Metrics = Field(default_factory=Metrics, description="Metrics.")
    tracing: Tracing = Field(default_factory=Tracing, description="Traces of requests.")
    test: Test = Field(default_factory=Test, description="What `helm test` does.")


def _from_anywhere() -> list[JsonObject]:
    return [{"namespaceSelector": {}}]


def _resources(*, cpu: str, memory: str, memory_limit: str) -> Resources:
    return Resources(
        requests=ResourceAmounts.model_validate({"cpu": cpu, "memory": memory}),
        limits=ResourceAmounts.model_validate({"memory": memory_limit}),
    )
