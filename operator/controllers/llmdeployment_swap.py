"""Has a replica take new weights while it serves, and notes on its pod what it serves now."""

from __future__ import annotations

import json

from mizzen.operator.controllers.llmdeployment_plan import Plan
from mizzen.operator.controllers.llmdeployment_replicas import restarts_of
from mizzen.operator.desired import labels
from mizzen.operator.desired.serving import made_from
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.runtimes import WeightsRefusedError


async def swap_weights(plan: Plan, facts: Facts, kube: Kube) -> str:
    """Swap the weights of the replica that the plan names; return why that cannot be, if so.

    Raises:
        KubeError: they were swapped, but that could not be noted; swapping again does no harm.
    """
    group, course = plan.swap, plan.course
    if group is None or group.leader is None:
        return ""
    try:
        is_done = await facts.runtimes.load_weights(group.address, course.swap_path)
    except WeightsRefusedError as error:
        return str(error)
    if is_done:
        note = json.dumps(
            made_from(course.servings[course.target]), sort_keys=True, separators=(",", ":")
        )
        await kube.annotate(
            group.leader,
            {labels.MADE_FROM: note, labels.SWAPPED: str(restarts_of(group.leader))},
            labels={labels.REVISION: course.target},
        )
    return ""
