"""Every child of a deployment but its pods, which come and go one by one."""

from __future__ import annotations

from mizzen.operator.crds.common import Json
from mizzen.operator.desired.adapters import build_adapters
from mizzen.operator.desired.groups import build_ranks_policy, build_ranks_service
from mizzen.operator.desired.services import build_disruption_budget, build_service
from mizzen.operator.desired.serving import Serving


def build_children(
    serving: Serving, *, has_served: bool, has_groups: bool, replicas: int
) -> tuple[Json, ...]:
    """Return the manifests for this many replicas, in the order in which they are written.

    The Service waits until a replica serves: made earlier, it would have its endpoints written
    twice more, by controllers that tell everybody of replicas that cannot serve yet.
    `has_groups` says whether replicas of several pods are there, of any revision, or wanted.
    """
    spec, name = serving.spec, serving.name
    namespace, owner = serving.namespace, serving.owner
    nodes = spec.parallelism.nodes
    children: list[Json] = []
    if has_groups:
        children.append(build_ranks_policy(name, namespace=namespace, owner=owner))
        children.append(build_ranks_service(name, namespace=namespace, owner=owner))
    if has_served:
        children.append(build_service(name, namespace=namespace, owner=owner))
    if serving.adapters:
        children.append(
            build_adapters(name, namespace=namespace, owner=owner, adapters=serving.adapters)
        )
    if replicas > 1:
        # A budget for a single replica would block every node drain for ever.
        children.append(
            build_disruption_budget(
                name, namespace=namespace, owner=owner, replicas=replicas, nodes=nodes
            )
        )
    return tuple(children)
