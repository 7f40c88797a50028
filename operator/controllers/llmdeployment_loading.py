"""Asks starting replicas how far their model has come, where it is fetched from elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from mizzen.operator.controllers.llmdeployment_observe import Observed
from mizzen.operator.controllers.llmdeployment_replicas import Group
from mizzen.operator.crds.common import Json
from mizzen.operator.facts import Facts
from mizzen.operator.planning.rollout import Standing
from mizzen.operator.status.loading import Loading, parse_loading, told_loading

# A look that is younger is told again: every new one costs a write of the status.
_LOOK_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class LoadingSeen:
    """What the starting replicas said, by the name of their leader's pod."""

    by_pod: Mapping[str, Loading] = field(default_factory=dict)
    look_again_after_s: float | None = None


async def ask_loading(
    groups: Iterable[Group], observed: Observed, facts: Facts, *, now: datetime
) -> LoadingSeen:
    """Return how far each starting replica is; one that does not answer is left out."""
    starting = [group for group in groups if _may_be_loading(group)]
    if not starting or not observed.serving.model.is_remote:
        return LoadingSeen()
    told = {pod["name"]: told_loading(pod) for pod in observed.status.get("pods") or []}
    leaders = [group.leader for group in starting if group.leader]
    looks = await asyncio.gather(*(_look(pod, told, facts, now) for pod in leaders))
    found = zip(leaders, looks, strict=True)
    return LoadingSeen(
        {pod["metadata"]["name"]: look for pod, look in found if look}, _LOOK_EVERY_S
    )


def _may_be_loading(group: Group) -> bool:
    return group.standing is Standing.STARTING and group.is_running and bool(group.address)


async def _look(
    pod: Json, told: Mapping[str, Loading | None], facts: Facts, now: datetime
) -> Loading | None:
    last = told.get(pod["metadata"]["name"])
    if last and now - last.observed_at < timedelta(seconds=_LOOK_EVERY_S):
        return last
    answer = await facts.runtimes.loading(pod["status"]["podIP"])
    return parse_loading(answer or {}, observed_at=now)
