"""One look at a deployment: its spec, its pods, and what its runtimes say. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from mizzen.operator.controllers.llmdeployment_adapters import promoted_artifacts, promoted_model
from mizzen.operator.controllers.llmdeployment_replicas import Group, read_groups
from mizzen.operator.crds import finetunejob
from mizzen.operator.crds.common import Json
from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.operator.desired import labels
from mizzen.operator.desired.adapters import PromotedArtifact, wanted_adapters
from mizzen.operator.desired.serving import Serving, revision_of
from mizzen.operator.desired.sources import locate_model
from mizzen.operator.engine.key import Key
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import uid_of
from mizzen.operator.planning.capacity import too_many_devices
from mizzen.operator.planning.fit import DoesNotFitError
from mizzen.operator.planning.rollout import COUNTS, Standing
from mizzen.operator.routing import PROMOTES_TO, ref_of
from mizzen.operator.specs import InvalidSpecError
from mizzen.operator.status.causes import Cause
from mizzen.operator.status.fit import PLAN, refuse_misfit
from mizzen.operator.status.reasons import Reason


class SpecRefusedError(Exception):
    """The spec cannot be followed; its text says which field to change."""

    def __init__(self, message: str, reason: Reason = Reason.INVALID_SPEC) -> None:
        super().__init__(message)
        self.reason = reason


# Of these kinds a deployment has children that it may come not to want any more.
PRUNED_KINDS = (
    *("PodDisruptionBudget", "ConfigMap", "ControllerRevision"),
    *("Service", "NetworkPolicy"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What one reconcile decides on."""

    resource: Json
    serving: Serving
    revision: str
    groups: tuple[Group, ...] = ()
    children: tuple[Json, ...] = ()  # of PRUNED_KINDS
    in_flight: Mapping[str, int | None] = field(default_factory=dict)  # by address, of draining
    has_service: bool = False
    too_large: Cause | None = None  # no node could ever take one of its pods

    @property
    def spec(self) -> LLMDeploymentSpec:
        """What the user wants."""
        return self.serving.spec

    @property
    def desired(self) -> int:
        """How many replicas should run: a fixed number, or what the autoscaler wants.

        It begins with those that are there, so until it has looked none of them goes.
        """
        scaled = (self.status.get("scaling") or {}).get("desired")
        if scaled is None:
            there = sum(group.standing in COUNTS for group in self.groups)
            scaled = max(there, self.spec.desired_replicas)
        return self.spec.wanted_replicas(scaled)

    @property
    def is_holding(self) -> bool:
        """Whether requests are held back, because the deployment is about to rest."""
        return bool((self.status.get("scaling") or {}).get("holding"))

    @property
    def status(self) -> Json:
        """The status as it was last written."""
        return self.resource.get("status") or {}

    @property
    def generation(self) -> int:
        """The generation of the spec that was looked at."""
        return int(self.resource["metadata"]["generation"])


def find_resource(key: Key, facts: Facts) -> Json | None:
    """Return the resource, or None once it is deleted."""
    resource = facts.store.get(ref_of(key))
    if resource is None or "deletionTimestamp" in resource["metadata"]:
        return None
    return resource


def read_serving(resource: Json, facts: Facts) -> Serving:
    """Return the deployment with everything that its pods follow from.

    Raises:
        SpecRefusedError: the stored spec says something that cannot be followed.
    """
    metadata, config = resource["metadata"], facts.config
    try:
        spec = facts.specs.deployment(resource)
        locate_model(spec.model.source)
    except (InvalidSpecError, ValueError) as error:
        raise SpecRefusedError(str(error)) from error
    jobs = facts.store.lookup(
        finetunejob.KIND, PROMOTES_TO, metadata["namespace"], metadata["name"]
    )
    promoted = promoted_model(jobs)
    serving = Serving(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=uid_of(resource),
        spec=_serving(spec, promoted) if promoted else spec,
        promoted=promoted,
        image=config.runtime_image,
        pull_policy=config.image_pull_policy,
        pull_secrets=tuple(config.image_pull_secrets),
        otlp_endpoint=config.otlp_endpoint,
        is_let_in=spec.accelerator.resource in facts.ledger.shared,
        adapters=wanted_adapters(spec.adapters, promoted_artifacts(jobs)),
    )
    try:
        known = (resource.get("status") or {}).get(PLAN)
        refuse_misfit(known, serving.spec, revision=revision_of(serving))
    except DoesNotFitError as error:
        raise SpecRefusedError(str(error), Reason.DOES_NOT_FIT) from error
    return serving


def _serving(spec: LLMDeploymentSpec, promoted: PromotedArtifact) -> LLMDeploymentSpec:
    """Return the spec with a promoted model's folder for its source, which lies on a claim."""
    source = {"source": promoted.uri, "credentials": None, "cache": None}
    return spec.model_copy(update={"model": spec.model.model_copy(update=source)})


async def observe(
    key: Key,
    resource: Json,
    serving: Serving,
    *,
    kube: Kube,
    facts: Facts,
    now: datetime,
    ask_server: bool = False,
) -> Observed:
    """Return the deployment as it stands.

    The store may be a moment behind; `ask_server` reads the pods anew, which is due before a
    replica is taken away from those who use it.
    """
    pods = facts.store.children(key, "Pod")
    if ask_server:
        selector = labels.deployment_selector(key.name)
        listing = await kube.list("v1", "Pod", namespace=key.namespace, label_selector=selector)
        pods = listing.items
    groups = tuple(read_groups(pods, owner_uid=serving.uid, now=now))
    return Observed(
        resource=resource,
        serving=serving,
        revision=revision_of(serving),
        groups=groups,
        children=tuple(
            child
            for kind in PRUNED_KINDS
            for child in facts.store.children(key, kind)
            if _is_owned(child, serving.uid)
        ),
        in_flight=await _in_flight(groups, facts),
        has_service=facts.store.get(("v1", "Service", key.namespace, key.name)) is not None,
        too_large=await _too_large(serving, groups, kube, facts, now),
    )


async def _in_flight(groups: tuple[Group, ...], facts: Facts) -> dict[str, int | None]:
    """Tell the draining replicas to refuse new requests; return how many each has left."""
    draining = [g for g in groups if g.standing is Standing.DRAINING and g.is_running and g.address]
    return {group.address: await facts.runtimes.drain(group.address) for group in draining}


async def _too_large(
    serving: Serving, groups: tuple[Group, ...], kube: Kube, facts: Facts, now: datetime
) -> Cause | None:
    """Return why none of its pods can ever be placed; asked only while one finds no place."""
    resource, wanted = serving.spec.accelerator.resource, serving.spec.devices_per_pod
    is_stuck = any(
        group.cause
        and group.cause.reason is Reason.UNSCHEDULABLE
        and resource in group.cause.message
        for group in groups
    )
    if not wanted or not is_stuck:
        return None
    largest = await facts.nodes.largest(resource, kube, now=now)
    if largest is None:
        return None
    why = too_many_devices(resource, wanted=wanted, largest=largest)
    return Cause(Reason.TOO_MANY_DEVICES, why) if why else None


def _is_owned(child: Json, uid: str) -> bool:
    owners = child["metadata"].get("ownerReferences") or []
    return any(owner.get("uid") == uid for owner in owners)
