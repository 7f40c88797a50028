"""Kubernetes objects, reduced to what the gateway needs and put where it looks them up.

A strange object is taken for what can be read of it: one of them must not stop a watch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from mizzen.runtime.gateway.directory import (
    Canary,
    Directory,
    Endpoint,
    EndpointState,
    ObjectKey,
    ServedModel,
)
from mizzen.runtime.gateway.guardrails import Guardrail
from mizzen.runtime.gateway.keys import LIMITS_ANNOTATION, Keyring, parse_secret
from mizzen.runtime.gateway.kube import KubeObject
from mizzen.runtime.gateway.limits import parse_limits
from mizzen.runtime.gateway.prompts import Template

log = logging.getLogger(__name__)

DEPLOYMENT_LABEL = "mizzen.dev/deployment"
_HTTP_PORT_NAME = "http"
_HTTP_PORT = 8000


def object_key(item: KubeObject) -> ObjectKey:
    """Return namespace and name."""
    metadata = item["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def parse_model(item: KubeObject) -> ServedModel:
    """Read an LLMDeployment: its served name and the adapters that are on some replica."""
    namespace, name = object_key(item)
    spec = _mapping(item.get("spec"))
    scales = bool(spec.get("scaling"))
    status = _mapping(item.get("status"))
    return ServedModel(
        namespace=namespace,
        deployment=name,
        name=str(_mapping(spec.get("model")).get("servedName") or name),
        created_at_s=_epoch_s(item["metadata"].get("creationTimestamp")),
        adapters=tuple(
            sorted(
                str(adapter["name"])
                for adapter in _mappings(status.get("adapters"))
                if adapter.get("name") and (adapter.get("readyReplicas") or 0) > 0
            )
        ),
        scales=scales,
        is_off=not scales and spec.get("replicas") == 0,
        start_s=_longest_start_s(_mapping(status.get("scaling"))),
        loaded=frozenset(
            (str(adapter), str(pod.get("name")))
            for pod in _mappings(status.get("pods"))
            for adapter in _list(pod.get("adapters"))
        ),
        canary=_canary(_mapping(status.get("rollout"))),
        trials=tuple(
            (str(adapter["name"]), str(adapter.get("digest")))
            for adapter in _mappings(status.get("adapters"))
            if adapter.get("name") and adapter.get("onTrial") is True
        ),
        prompts=tuple(_template(entry) for entry in _mappings(spec.get("prompts"))),
        guardrails=tuple(_guardrail(entry) for entry in _mappings(spec.get("guardrails"))),
    )


def _template(entry: dict[str, Any]) -> Template:
    messages = _mappings(entry.get("messages"))
    return Template(
        str(entry.get("id")),
        tuple((str(one.get("role")), str(one.get("content"))) for one in messages),
    )


def _guardrail(entry: dict[str, Any]) -> Guardrail:
    max_chars = entry.get("maxChars")
    return Guardrail(
        name=str(entry.get("name")),
        is_output=entry.get("stage") == "Output",
        deny=tuple(str(pattern) for pattern in _list(entry.get("deny"))),
        max_chars=max_chars if isinstance(max_chars, int) else None,
        redacts=entry.get("action") == "Redact",
        fails_open=entry.get("onError") == "Allow",
    )


def _longest_start_s(scaling: dict[str, Any]) -> float | None:
    told = _list(_mapping(scaling.get("learned")).get("startSeconds"))
    return max((float(one) for one in told if isinstance(one, int | float)), default=None)


def _canary(rollout: dict[str, Any]) -> Canary | None:
    """Read the revision that is tried; one that was given up gets no request at all."""
    weight = 0 if rollout.get("failure") else _mapping(rollout.get("canary")).get("weight")
    if not isinstance(weight, int) or not rollout.get("stable"):
        return None
    return Canary(str(rollout.get("revision")), str(rollout["stable"]), weight)


def parse_slice(item: KubeObject) -> tuple[ObjectKey, tuple[Endpoint, ...]]:
    """Read an EndpointSlice: its deployment, and the replicas that answer."""
    namespace, _ = object_key(item)
    labels = item["metadata"].get("labels") or {}
    port = next(
        (
            p["port"]
            for p in item.get("ports") or ()
            if p.get("name") == _HTTP_PORT_NAME and p.get("port")
        ),
        _HTTP_PORT,
    )
    endpoints = [
        Endpoint(
            f"http://{_host(address)}:{port}",
            state,
            pod=str(_mapping(entry.get("targetRef")).get("name") or ""),
        )
        for entry in item.get("endpoints") or ()
        if (state := _state(_mapping(entry.get("conditions")))) is not None
        # Several addresses of one entry are the same pod: the first is enough.
        for address in (entry.get("addresses") or ())[:1]
    ]
    return (namespace, labels.get(DEPLOYMENT_LABEL, "")), tuple(endpoints)


class ModelSink:
    """LLMDeployments into the directory, of one namespace or of all."""

    def __init__(self, directory: Directory, namespace: str | None = None) -> None:
        self._directory = directory
        self._namespace = namespace

    def replace(self, items: Sequence[KubeObject]) -> None:
        """Take the whole list."""
        models = [parse_model(item) for item in items]
        self._directory.replace_models(models, namespace=self._namespace)

    def put(self, item: KubeObject) -> None:
        """Take a new or changed deployment."""
        self._directory.put_model(parse_model(item))

    def drop(self, item: KubeObject) -> None:
        """Forget a deleted deployment."""
        self._directory.drop_model(object_key(item))


class SliceSink:
    """EndpointSlices into the directory, of one namespace or of all."""

    def __init__(self, directory: Directory, namespace: str | None = None) -> None:
        self._directory = directory
        self._namespace = namespace

    def replace(self, items: Sequence[KubeObject]) -> None:
        """Take the whole list."""
        slices = {object_key(item): parse_slice(item) for item in items}
        self._directory.replace_slices(slices, namespace=self._namespace)

    def put(self, item: KubeObject) -> None:
        """Take a new or changed slice."""
        deployment, endpoints = parse_slice(item)
        self._directory.put_slice(object_key(item), deployment=deployment, endpoints=endpoints)

    def drop(self, item: KubeObject) -> None:
        """Forget a deleted slice."""
        self._directory.drop_slice(object_key(item))


class KeySink:
    """API key Secrets into the keyring."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def replace(self, items: Sequence[KubeObject]) -> None:
        """Take the whole list; a Secret that is not in it lets nobody in any more."""
        for gone in self._keyring.sources() - {_source(item) for item in items}:
            self._keyring.replace(gone, {})
        for item in items:
            self.put(item)

    def put(self, item: KubeObject) -> None:
        """Take a new or changed Secret."""
        data = item.get("data")
        noted = _mapping(item["metadata"].get("annotations")).get(LIMITS_ANNOTATION) or ""
        try:
            limits = parse_limits(str(noted))
        except ValueError as error:
            # A limit that cannot be read must not be none: better that nobody gets in by this key.
            log.warning("Secret %s lets nobody in: %s: %s", _source(item), LIMITS_ANNOTATION, error)
            self._keyring.replace(_source(item), {})
            return
        keys, bad = parse_secret(data if isinstance(data, dict) else {}, limits)
        for key_id in bad:
            log.warning(
                "Secret %s: entry %s is not `sha256:SALT:HASH`; use `mizzen keys create`",
                _source(item),
                key_id,
            )
        self._keyring.replace(_source(item), keys)

    def drop(self, item: KubeObject) -> None:
        """Forget a deleted Secret and its keys."""
        self._keyring.replace(_source(item), {})


def _source(item: KubeObject) -> str:
    return "/".join(object_key(item))


def _state(conditions: dict[str, Any]) -> EndpointState | None:
    # An absent `ready` means ready, as the API says.
    if conditions.get("ready") is not False:
        return EndpointState.READY
    if conditions.get("terminating") and conditions.get("serving"):
        return EndpointState.TERMINATING
    return None


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: object) -> list[dict[str, Any]]:
    return [one for one in _list(value) if isinstance(one, dict)]


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _epoch_s(timestamp: object) -> int:
    try:
        return int(datetime.fromisoformat(str(timestamp)).timestamp())
    except ValueError:
        return 0
