"""Asks a replica in service what its model takes, once for each revision."""

from __future__ import annotations

from collections.abc import Iterable

from mizzen.operator.controllers.llmdeployment_observe import Observed
from mizzen.operator.controllers.llmdeployment_replicas import Group
from mizzen.operator.facts import Facts
from mizzen.operator.planning.rollout import Standing
from mizzen.operator.status.conditions import Document
from mizzen.operator.status.fit import PLAN, fit_document


async def ask_fit(groups: Iterable[Group], observed: Observed, facts: Facts) -> Document | None:
    """Return `status.plan`: of the wanted revision where one of its replicas serves and answers.

    Else what an earlier one said stays.
    """
    told: Document | None = observed.status.get(PLAN)
    if told and told["revision"] == observed.revision:
        return told
    for group in groups:
        if group.standing is Standing.IN_SERVICE and group.replica.revision == observed.revision:
            answer = await facts.runtimes.model(group.address)
            found = fit_document(answer or {}, observed.spec, revision=observed.revision)
            return found or told
    return told
