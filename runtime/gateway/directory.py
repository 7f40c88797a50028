"""What is served and where: model names and the replicas behind them. Does no I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from mizzen.runtime.gateway.guardrails import Guardrail
from mizzen.runtime.gateway.prompts import Template

ObjectKey = tuple[str, str]
"""Namespace and name of a Kubernetes object."""


class EndpointState(Enum):
    """Whether a replica takes new requests."""

    READY = "ready"
    # Still answers while it goes away: used only when nothing is ready.
    TERMINATING = "terminating"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Rank 0 of one replica."""

    url: str
    state: EndpointState = EndpointState.READY
    pod: str = ""


@dataclass(frozen=True, slots=True)
class Canary:
    """A new revision that is tried with a part of the requests."""

    revision: str
    stable: str
    weight: int  # percent


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One LLMDeployment as clients see it."""

    namespace: str
    deployment: str
    name: str
    created_at_s: int = 0
    adapters: tuple[str, ...] = ()
    loaded: frozenset[tuple[str, str]] = frozenset()
    """Which adapter is on which pod, as pairs of their names."""
    scales: bool = False
    """Whether its number of replicas follows its load, so that a wake is of use."""
    is_off: bool = False
    """Whether its spec asks for no replica at all."""
    start_s: float | None = None
    """The longest of its last starts, as the operator measured them."""
    canary: Canary | None = None
    trials: tuple[tuple[str, str], ...] = ()
    """Adapters that are watched before their job counts as promoted, with their digests."""
    prompts: tuple[Template, ...] = ()
    guardrails: tuple[Guardrail, ...] = ()

    @property
    def key(self) -> ObjectKey:
        """Key of the LLMDeployment."""
        return self.namespace, self.deployment

    def is_canary(self, endpoint: Endpoint) -> bool:
        """Whether the replica is of the revision that is tried: its pod is named after it."""
        return self.canary is not None and endpoint.pod.startswith(
            f"{self.deployment}-{self.canary.revision}-"
        )


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: a deployment, perhaps one of its adapters."""

    model: ServedModel
    adapter: str | None = None

    @property
    def upstream_name(self) -> str:
        """What its replicas call the model."""
        name = self.model.name
        return name if self.adapter is None else f"{name}:{self.adapter}"

    @property
    def is_on_trial(self) -> bool:
        """Whether it leads to an adapter that is watched."""
        return any(adapter == self.adapter for adapter, _ in self.model.trials)


@dataclass(slots=True)
class Directory:
    """Model names to deployments, deployments to replicas; kept by the watches."""

    _models: dict[ObjectKey, ServedModel] = field(default_factory=dict)
    _slices: dict[ObjectKey, tuple[ObjectKey, tuple[Endpoint, ...]]] = field(default_factory=dict)
    _slices_of: dict[ObjectKey, set[ObjectKey]] = field(default_factory=dict)
    _by_name: dict[str, ServedModel] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _listed_as: dict[ObjectKey, str] = field(default_factory=dict)
    on_endpoint_gone: Callable[[str], None] | None = None
    on_change: Callable[[], None] | None = None
    on_model_gone: Callable[[ObjectKey], None] | None = None

    # Models.

    def put_model(self, model: ServedModel) -> None:
        """Learn of a deployment, or of its new name or adapters."""
        if self._models.get(model.key) != model:
            self._models[model.key] = model
            self._index_names()

    def drop_model(self, key: ObjectKey) -> None:
        """Forget a deployment."""
        if self._models.pop(key, None) is not None:
            self._index_names()
            self._report_models_gone([key])

    def replace_models(self, models: Iterable[ServedModel], *, namespace: str | None) -> None:
        """Learn the whole list anew, of one namespace or (None) of all."""
        before = self._models
        kept = {k: m for k, m in before.items() if not _is_in(k, namespace)}
        self._models = kept | {model.key: model for model in models}
        self._index_names()
        self._report_models_gone([key for key in before if key not in self._models])

    def model(self, key: ObjectKey) -> ServedModel | None:
        """The deployment as it is known now."""
        return self._models.get(key)

    def _report_models_gone(self, keys: Iterable[ObjectKey]) -> None:
        if self.on_model_gone is not None:
            for key in keys:
                self.on_model_gone(key)

    def models(self) -> list[tuple[str, ServedModel]]:
        """Every deployment with the plainest name that reaches it, sorted by that name."""
        return sorted(
            ((name, self._models[key]) for key, name in self._listed_as.items()),
            key=lambda entry: entry[0],
        )

    def names(self) -> list[str]:
        """Every name a client can ask for, adapters included."""
        return [
            name if adapter is None else f"{name}:{adapter}"
            for name, model in self.models()
            for adapter in (None, *model.adapters)
        ]

    def resolve(self, name: str) -> Route | None:
        """Find the deployment for `MODEL`, `MODEL:ADAPTER`, each with or without `namespace/`."""
        if (model := self._by_name.get(name)) is not None:
            return Route(model)
        base, colon, adapter = name.rpartition(":")
        if colon and adapter and (model := self._by_name.get(base)) is not None:
            # Whether the adapter exists is the replica's to say: it knows before status does.
            return Route(model, adapter)
        return None

    def _index_names(self) -> None:
        # The oldest deployment keeps a name, so that a newcomer elsewhere cannot take it over.
        by_age = sorted(self._models.values(), key=lambda m: (m.created_at_s, m.key))
        plain = [(model.name, model) for model in by_age]
        qualified = [(f"{model.namespace}/{model.name}", model) for model in by_age]
        by_object = [(f"{model.namespace}/{model.deployment}", model) for model in by_age]
        index: dict[str, ServedModel] = {}
        listed: dict[ObjectKey, str] = {}
        for name, model in plain + qualified + by_object:
            if index.setdefault(name, model) is model:
                listed.setdefault(model.key, name)
        self._by_name, self._listed_as = index, listed
        self._announce()

    # Replicas.

    def put_slice(
        self, key: ObjectKey, *, deployment: ObjectKey, endpoints: tuple[Endpoint, ...]
    ) -> None:
        """Learn of an EndpointSlice, or of its new content."""
        if self._slices.get(key) == (deployment, endpoints):
            return
        before = self._urls_of(key)
        self._remove_slice(key)
        self._slices[key] = (deployment, endpoints)
        self._slices_of.setdefault(deployment, set()).add(key)
        self._report_gone(before)
        self._announce()

    def drop_slice(self, key: ObjectKey) -> None:
        """Forget an EndpointSlice."""
        before = self._urls_of(key)
        self._remove_slice(key)
        self._report_gone(before)
        self._announce()

    def replace_slices(
        self,
        slices: Mapping[ObjectKey, tuple[ObjectKey, tuple[Endpoint, ...]]],
        *,
        namespace: str | None,
    ) -> None:
        """Learn the whole list anew, of one namespace or (None) of all."""
        for key in [k for k in self._slices if k not in slices and _is_in(k, namespace)]:
            self.drop_slice(key)
        for key, (deployment, endpoints) in slices.items():
            self.put_slice(key, deployment=deployment, endpoints=endpoints)

    def endpoints(self, deployment: ObjectKey) -> tuple[Endpoint, ...]:
        """Replicas that may be asked: the ready ones, else those still answering as they go."""
        found = self._all_endpoints(deployment)
        ready = tuple(e for e in found if e.state is EndpointState.READY)
        return ready or found

    def candidates(self, route: Route) -> tuple[Endpoint, ...]:
        """Replicas that may be asked for this model, those known to hold its adapter if any do."""
        found = self.endpoints(route.model.key)
        model = self._models.get(route.model.key)
        if route.adapter is None or model is None:
            return found
        return tuple(e for e in found if (route.adapter, e.pod) in model.loaded) or found

    def ready_count(self, deployment: ObjectKey) -> int:
        """How many replicas are ready."""
        found = self._all_endpoints(deployment)
        return sum(1 for e in found if e.state is EndpointState.READY)

    def _all_endpoints(self, deployment: ObjectKey) -> tuple[Endpoint, ...]:
        # While slices are rebalanced an address is in two of them for a moment.
        merged: dict[str, Endpoint] = {}
        for key in sorted(self._slices_of.get(deployment, ())):
            for endpoint in self._slices[key][1]:
                known = merged.get(endpoint.url)
                if known is None or known.state is not EndpointState.READY:
                    merged[endpoint.url] = endpoint
        return tuple(merged.values())

    def _urls_of(self, key: ObjectKey) -> tuple[ObjectKey, set[str]] | None:
        if key not in self._slices:
            return None
        deployment, _ = self._slices[key]
        return deployment, {e.url for e in self._all_endpoints(deployment)}

    def _remove_slice(self, key: ObjectKey) -> None:
        if (old := self._slices.pop(key, None)) is None:
            return
        keys = self._slices_of[old[0]]
        keys.discard(key)
        if not keys:
            del self._slices_of[old[0]]

    def _report_gone(self, before: tuple[ObjectKey, set[str]] | None) -> None:
        if before is None or self.on_endpoint_gone is None:
            return
        deployment, urls = before
        for url in urls - {e.url for e in self._all_endpoints(deployment)}:
            self.on_endpoint_gone(url)

    # Waiting.

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        if self.on_change is not None:
            self.on_change()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when something changed, or after `timeout_s`."""
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return


def _is_in(key: ObjectKey, namespace: str | None) -> bool:
    return namespace is None or key[0] == namespace
