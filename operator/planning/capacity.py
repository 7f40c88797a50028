"""What the cluster could hold at all. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def largest_node(resource: str, allocatables: Iterable[Mapping[str, object]]) -> int:
    """Return how many devices of this resource the best equipped node has, 0 for none."""
    return max((int(str(node.get(resource, 0))) for node in allocatables), default=0)


def too_many_devices(resource: str, *, wanted: int, largest: int) -> str | None:
    """Return why a pod fits no node, however empty it may be; None where one could take it."""
    if wanted <= largest:
        return None
    if largest == 0:
        return (
            f"A pod asks for {wanted} {resource} and no node has any. Add nodes that have them, "
            "or set spec.accelerator.resource to what the nodes offer."
        )
    return (
        f"A pod asks for {wanted} {resource} and the largest node has {largest}. Lower "
        "spec.accelerator.count or spec.parallelism.tensor, spread the replica with "
        "spec.parallelism.nodes, or add larger nodes."
    )
