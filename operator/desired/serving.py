"""The pods of a served model: one group of them is a replica. Pure and byte-stable.

`revision_of` hashes what the user wrote, not what we render: an operator that renders pods a
little differently must not restart every model in the cluster when it is upgraded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from mizzen.operator.crds.common import Json
from mizzen.operator.crds.llmdeployment import KIND, NOT_IN_REVISION, LLMDeploymentSpec
from mizzen.operator.desired import labels, pods
from mizzen.operator.desired.adapters import (
    ADAPTERS_FILE,
    ADAPTERS_FOLDER,
    ADAPTERS_VOLUME,
    PromotedArtifact,
    WantedAdapter,
    adapters_name,
)
from mizzen.operator.desired.groups import group_flags, group_spec, ranks_name
from mizzen.operator.desired.model_cache import (
    cache_flags,
    cache_mounts,
    cache_volumes,
    credentials_env,
)
from mizzen.operator.desired.sources import (
    Source,
    claim_mount,
    claim_volume,
    claims_of,
    locate_model,
)

CONTAINER = "runtime"
_GRACE_BEYOND_DRAIN_S = 30
_LONGEST_START_S = 3600
_PROBE_PERIOD_S = 2
# Lost nodes: 300 s, the cluster's default, is a long time to be one replica short.
_TOLERATE_LOST_NODE_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """One deployment with everything decided that its pods depend on."""

    name: str
    namespace: str
    uid: str
    spec: LLMDeploymentSpec
    image: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    adapters: tuple[WantedAdapter, ...] = ()
    promoted: PromotedArtifact | None = None  # whose model the spec's source was replaced by
    otlp_endpoint: str = ""
    is_let_in: bool = False  # its devices are lent to jobs, so the arbiter finds its pods a place

    @property
    def owner(self) -> Json:
        """The reference from a child to its deployment."""
        return labels.owner_reference(KIND, name=self.name, uid=self.uid)

    @property
    def model(self) -> Source:
        """Where a pod finds the weights."""
        return locate_model(self.spec.model.source)

    @property
    def claims(self) -> tuple[str, ...]:
        """The claims its pods mount: the model's and those of its adapters."""
        return claims_of([self.model, *(adapter.source for adapter in self.adapters)])

    @property
    def written_claims(self) -> tuple[str, ...]:
        """The claims that jobs on lent weights write to."""
        return claims_of([self.model]) if self.spec.engine.lends_weights else ()

    @property
    def adapter_folders(self) -> tuple[str, ...]:
        """Folders inside the image that adapters may come from."""
        return tuple(sorted({a.source.folder for a in self.adapters if a.source.claim is None}))


@dataclass(frozen=True, slots=True, kw_only=True)
class PodPlace:
    """Which pod of which replica, and what went wrong with its predecessors."""

    revision: str
    slot: int
    rank: int
    restarts: int = 0
    last_failure: str = ""


def pod_name(deployment: str, revision: str, *, slot: int, rank: int) -> str:
    """Return the name that a pod has for as long as its replica lives."""
    return f"{deployment}-{revision}-{slot}-{rank}"


def revision_of(serving: Serving) -> str:
    """Return the hash of all that makes pods differ.

    Adapters are loaded while a pod runs, but the volumes they lie on are not.
    """
    made = made_from(serving)
    places = [*serving.claims, *serving.adapter_folders]
    traces = [serving.otlp_endpoint] if serving.otlp_endpoint else []
    document = json.dumps([made["spec"], made["image"], places, *traces], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()[:8]


def made_from(serving: Serving) -> Json:
    """Return what a revision is made from, enough to make its pods again later.

    Only what differs from the defaults counts, so a field that a later version adds changes no
    revision.
    """
    spec = serving.spec.model_dump(
        mode="json", by_alias=True, exclude_defaults=True, exclude=set(NOT_IN_REVISION)
    )
    return {"spec": spec, "image": serving.image}


def build_pod(serving: Serving, place: PodPlace) -> Json:
    """Return one pod of a replica."""
    pod: Json = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": _pod_name(serving, place),
            "namespace": serving.namespace,
            "labels": _labels(serving, place),
            "annotations": _annotations(serving, place),
            "ownerReferences": [serving.owner],
        },
        "spec": _pod_spec(serving, place),
    }
    return pods.with_patch(pod, serving.spec.pod_template_patch)


def _labels(serving: Serving, place: PodPlace) -> dict[str, str]:
    return {
        **labels.deployment_labels(serving.name),
        labels.ROLE: labels.ROLE_RUNTIME,
        labels.REVISION: place.revision,
        labels.SLOT: str(place.slot),
        labels.RANK: str(place.rank),
    }


def _annotations(serving: Serving, place: PodPlace) -> dict[str, str]:
    annotations = {labels.GROUP_SIZE: str(serving.spec.parallelism.nodes)}
    if place.rank == 0:
        # The history is written from it once a second revision comes, so that a deployment which
        # never changes costs no write for it.
        annotations[labels.MADE_FROM] = json.dumps(
            made_from(serving), sort_keys=True, separators=(",", ":")
        )
    if place.restarts:
        annotations[labels.RESTARTS] = str(place.restarts)
    if place.last_failure:
        annotations[labels.LAST_FAILURE] = place.last_failure
    return annotations


def _pod_spec(serving: Serving, place: PodPlace) -> Json:
    spec = serving.spec
    is_group = spec.parallelism.nodes > 1
    pod_spec: Json = {
        # The kubelet restarts a lone pod in place. Of a group no rank can come back alone, so
        # there the operator replaces all of them together.
        "restartPolicy": "Never" if is_group else "Always",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.drain.max_seconds + _GRACE_BEYOND_DRAIN_S,
        "securityContext": pods.pod_security(),
        "tolerations": [
            {
                "key": f"node.kubernetes.io/{trouble}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": _TOLERATE_LOST_NODE_S,
            }
            for trouble in ("not-ready", "unreachable")
        ],
        "containers": [_container(serving, place)],
        "volumes": [
            *pods.scratch_volumes(),
            pods.admin_token_volume(),
            {
                "name": ADAPTERS_VOLUME,
                "configMap": {"name": adapters_name(serving.name), "optional": True},
            },
            *map(claim_volume, serving.claims),
            *cache_volumes(spec.model),
        ],
    }
    if serving.pull_secrets:
        pod_spec["imagePullSecrets"] = [{"name": name} for name in serving.pull_secrets]
    if place.rank == 0:
        pod_spec["readinessGates"] = [{"conditionType": labels.IN_SERVICE_GATE}]
    if is_group:
        subdomain = ranks_name(serving.name, serving.uid)
        pod_spec |= group_spec(name=_pod_name(serving, place), subdomain=subdomain)
    gates = [labels.GROUP_GATE] * is_group + [labels.CAPACITY_GATE] * serving.is_let_in
    if gates:
        pod_spec["schedulingGates"] = [{"name": gate} for gate in gates]
    return pod_spec


def _pod_name(serving: Serving, place: PodPlace) -> str:
    return pod_name(serving.name, place.revision, slot=place.slot, rank=place.rank)


def _container(serving: Serving, place: PodPlace) -> Json:
    spec = serving.spec
    return {
        "name": CONTAINER,
        "image": spec.engine.image or serving.image,
        "imagePullPolicy": serving.pull_policy,
        "command": ["mizzen"],
        "args": ["serve", serving.model.path, *_flags(serving), *_group_flags(serving, place)],
        "env": [
            {"name": "HOME", "value": "/tmp"},
            *credentials_env(spec.model),
            *_tracing_env(serving.otlp_endpoint),
        ],
        "ports": [
            {"name": "http", "containerPort": labels.HTTP_PORT},
            {"name": "grpc", "containerPort": labels.GRPC_PORT},
            {"name": "admin", "containerPort": labels.ADMIN_PORT},
            *_group_ports(spec),
        ],
        "resources": _resources(spec),
        "securityContext": pods.container_security(),
        **_probes(),
        "volumeMounts": [
            *pods.scratch_mounts(),
            pods.admin_token_mount(),
            {"name": ADAPTERS_VOLUME, "mountPath": ADAPTERS_FOLDER, "readOnly": True},
            *(
                claim_mount(claim, read_only=claim not in serving.written_claims)
                for claim in serving.claims
            ),
            *cache_mounts(spec.model),
        ],
    }


def _tracing_env(endpoint: str) -> list[Json]:
    return [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": endpoint}] if endpoint else []


def _flags(serving: Serving) -> list[str]:
    spec = serving.spec
    is_cut = spec.parallelism.pipeline > 1
    flags: dict[str, object | None] = {
        "--served-model-name": spec.model.served_name or serving.name,
        "--tensor-parallel-size": spec.parallelism.tensor,
        # Said only where it matters: an image of an earlier runtime does not know it.
        "--pipeline-parallel-size": spec.parallelism.pipeline if is_cut else None,
        "--dtype": spec.model.dtype,
        "--device": "auto" if spec.accelerator.is_gpu else "cpu",
        "--max-model-len": spec.model.max_model_len,
        "--max-num-seqs": spec.engine.max_num_seqs,
        "--max-num-batched-tokens": spec.engine.max_num_batched_tokens,
        "--kv-cache-gib": spec.engine.kv_cache_gib,
        "--drain-seconds": spec.drain.max_seconds,
        "--admin-token-file": f"{labels.ADMIN_TOKEN_FOLDER}/{labels.ADMIN_TOKEN_KEY}",
        "--adapters-file": ADAPTERS_FILE,
        **cache_flags(spec.model),
    }
    given = [(flag, str(value)) for flag, value in flags.items() if value is not None]
    given += [("--adapter-root", folder) for folder in serving.adapter_folders]
    return [word for pair in given for word in pair]


def _group_flags(serving: Serving, place: PodPlace) -> list[str]:
    nodes = serving.spec.parallelism.nodes
    if nodes == 1:
        return []
    return group_flags(
        nodes=nodes,
        rank=place.rank,
        leader=_pod_name(serving, replace(place, rank=0)),
        subdomain=ranks_name(serving.name, serving.uid),
        namespace=serving.namespace,
    )


def _group_ports(spec: LLMDeploymentSpec) -> list[Json]:
    is_group = spec.parallelism.nodes > 1
    return [{"name": "ranks", "containerPort": labels.RANKS_PORT}] if is_group else []


def _resources(spec: LLMDeploymentSpec) -> Json:
    resources: Json = {"requests": dict(pods.DEFAULT_REQUESTS)}
    if spec.devices_per_pod:
        # Extended resources cannot be overcommitted: a limit is the request too.
        resources["limits"] = {spec.accelerator.resource: str(spec.devices_per_pod)}
    return resources


def _probes() -> Json:
    """Return the three probes.

    Readiness is asked often, because a client waits for every second of it; liveness rarely and
    patiently, because a restart costs minutes of loading.
    """

    def ask(path: str, *, period_s: int, failures: int, timeout_s: int = 2) -> Json:
        return {
            "httpGet": {"path": path, "port": labels.ADMIN_PORT},
            "periodSeconds": period_s,
            "failureThreshold": failures,
            "timeoutSeconds": timeout_s,
        }

    starts = _LONGEST_START_S // _PROBE_PERIOD_S
    return {
        "startupProbe": ask("/readyz", period_s=_PROBE_PERIOD_S, failures=starts),
        "readinessProbe": ask("/readyz", period_s=_PROBE_PERIOD_S, failures=2),
        "livenessProbe": ask("/healthz", period_s=10, failures=6, timeout_s=5),
    }
