"""Has a replica take new weights while it serves, and notes on its pod what it serves now."""

from __future__ import annotations

import json

from mizzen.operator.controllers.llmdeployment_plan import Plan
from mizzen.operator.controllers.llmdeployment_replicas import WEIGHTS_UNKNOWN, restarts_of
from mizzen.operator.desired import labels
from mizzen.operator.desired.serving import made_from
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.runtimes import WeightsRefusedError


async def swap_weights(plan: Plan, facts: Facts, kube: Kube) -> str:
    """Swap the weights of the replica that the plan names; return why that cannot be, if so.

    Noted before it is asked for: a replica that did not answer in time, or whose answer no
    operator lived to note, may serve other weights than its label says.

    Raises:
        KubeError: that could not be noted; swapping again does no harm.
    """
    group, course = plan.swap, plan.course
    if group is None or group.leader is None:
        return ""
    pending = (group.leader["metadata"].get("annotations") or {}).get(labels.SWAPPING)
    if pending != course.target:
        await kube.annotate(group.leader, {labels.SWAPPING: course.target})
    try:
        is_done = await facts.runtimes.load_weights(group.address, course.swap_path)
    except WeightsRefusedError as error:
        is_as_before = pending in (None, course.target)
        note = {labels.SWAPPING: None} if is_as_before else {labels.SWAPPED: WEIGHTS_UNKNOWN}
        await kube.annotate(group.leader, note)
        return str(error)
    if is_done:
        made = made_from(course.servings[course.target])
        await kube.annotate(
            group.leader,
            {
                labels.MADE_FROM: json.dumps(made, sort_keys=True, separators=(",", ":")),
                labels.SWAPPED: str(restarts_of(group.leader)),
                labels.SWAPPING: None,
            },
            labels={labels.REVISION: course.target},
        )
    return ""
