"""Every child of a deployment but its pods, which come and go one by one."""

from __future__ import annotations

from mizzen.operator.crds.common import Json
from mizzen.operator.desired.adapters import build_adapters
from mizzen.operator.desired.services import build_disruption_budget, build_service
from mizzen.operator.desired.serving import Serving


def build_children(serving: Serving, *, has_served: bool) -> tuple[Json, ...]:
    """Return the manifests in the order in which they are written.

    The Service waits until a replica serves: made earlier, it would have its endpoints written
    twice more, by controllers that tell everybody of replicas that cannot serve yet.
    """
    spec, name = serving.spec, serving.name
    namespace, owner = serving.namespace, serving.owner
    nodes, replicas = spec.parallelism.nodes, spec.desired_replicas
    children: list[Json] = []
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
