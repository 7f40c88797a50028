"""Puts a promoted adapter to its probe prompts, once, and takes it back where it talks no sense."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from mizzen.operator.controllers.llmdeployment_replicas import read_groups
from mizzen.operator.controllers.probing import ask_probes
from mizzen.operator.crds import rollout
from mizzen.operator.crds.common import Json
from mizzen.operator.engine.key import Key
from mizzen.operator.facts import Facts
from mizzen.operator.kube.documents import uid_of
from mizzen.operator.planning.canary import Probe
from mizzen.operator.planning.promotions import place_of
from mizzen.operator.planning.rollout import Standing
from mizzen.operator.routing import DEPLOYMENT
from mizzen.operator.status.job_facts import Problem, Promotion
from mizzen.operator.status.reasons import Reason

_UNANSWERED = Problem(
    Reason.PROMOTING,
    "Every ready replica has the result; its probe prompts are not answered yet. If it stays so, "
    "the log of a replica says why.",
)


async def probe_promotion(
    promotion: Promotion, job: Json, deployment: Json, facts: Facts, now: datetime
) -> Promotion:
    """Return the promotion as its probes leave it.

    They are asked of one replica when every ready replica has the result and before the job says
    `Promoted`: a name that has been served with once is not taken back for a changed answer.
    """
    if promotion.on_trial_since:
        return promotion  # what begins after they were answered
    probes = _probes_of(job)
    if not probes or promotion.was_done or not promotion.is_done or promotion.replaced_by:
        return promotion
    address = _replica(deployment, facts, now)
    if not address:
        return replace(promotion, problem=_UNANSWERED)
    answers = await ask_probes(facts.runtimes, address, place_of(job), probes)
    for number, (probe, (outcome, said)) in enumerate(zip(probes, answers, strict=True), 1):
        if outcome is Probe.UNEXPECTED:
            return replace(promotion, problem=_taken_back(number, probe, said))
    if any(outcome is Probe.NO_ANSWER for outcome, _ in answers):
        return replace(promotion, problem=_UNANSWERED)
    return promotion


def _probes_of(job: Json) -> tuple[rollout.Probe, ...]:
    given = (job["spec"].get("promotion") or {}).get("probes") or []
    return tuple(map(rollout.Probe.model_validate, given))


def _replica(deployment: Json, facts: Facts, now: datetime) -> str:
    """Return the address of a replica in service, empty where there is none."""
    metadata = deployment["metadata"]
    pods = facts.store.children(Key(DEPLOYMENT, metadata["namespace"], metadata["name"]), "Pod")
    groups = read_groups(pods, owner_uid=uid_of(deployment), now=now)
    serving = (group.address for group in groups if group.standing is Standing.IN_SERVICE)
    return next(serving, "")


def _taken_back(number: int, probe: rollout.Probe, said: str) -> Problem:
    return Problem(
        Reason.ROLLED_BACK,
        f"The result was taken back: its answer to probe {number} does not match "
        f"{probe.expect!r}: {said!r}. What it replaced serves again. Change the data, the learning "
        "rate or the probe, and submit a new job.",
        is_final=True,
    )
