"""Which job's result a deployment serves, where several jobs were promoted to the same place. Pure.

A place is a name of an adapter on the deployment, or the deployment's own model. Whoever was
promoted to it first holds it; it moves on only to a job that says whose result it replaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mizzen.operator.crds.common import Json

APPROVE = "mizzen.dev/approve"  # on the FineTuneJob, by whoever approves: a name
MODEL = ""  # the place of the deployment's own model


def place_of(job: Json) -> str:
    """Return where a job's result is to be served: an adapter's name, or MODEL."""
    promotion = job["spec"].get("promotion") or {}
    if promotion.get("strategy") == "Canary":
        return MODEL
    return str(promotion.get("adapter") or job["metadata"]["name"])


def needs_approval(job: Json) -> bool:
    """Whether a person has to agree before anything is served."""
    return (job["spec"].get("promotion") or {}).get("approval") == "Manual"


def approver_of(job: Json) -> str | None:
    """Return who has approved, None while nobody has."""
    return (job["metadata"].get("annotations") or {}).get(APPROVE) or None


def promoted_at(job: Json) -> str | None:
    """Return since when a job's result may be served, None where it may not (yet)."""
    if "deletionTimestamp" in job["metadata"]:
        return None
    true_since = _true_since(job)
    published = true_since.get("Published")
    # Its model was rolled back: any new revision of the deployment would send it out again.
    if published is None or "Failed" in true_since:
        return None
    if not needs_approval(job):
        return published
    if approver_of(job) is None:
        return None
    promotion: Json = (job.get("status") or {}).get("promotion") or {}
    return promotion.get("approvedAt")


def choose_holders(jobs: Iterable[Json]) -> Mapping[str, Json]:
    """Return the job that holds each place."""
    holders: dict[str, Json] = {}
    ready = [(at, job["metadata"]["uid"], job) for job in jobs if (at := promoted_at(job))]
    for _, _, job in sorted(ready, key=lambda entry: entry[:2]):
        place = place_of(job)
        holder = holders.get(place)
        replaces = job["spec"]["promotion"].get("replaces")
        if holder is None or replaces == holder["metadata"]["name"]:
            holders[place] = job
    return holders


def served_model(jobs: Iterable[Json]) -> str | None:
    """Return the address of the promoted model that a deployment serves on every replica."""
    holder = choose_holders(jobs).get(MODEL)
    if holder is None or "Promoted" not in _true_since(holder):
        return None
    return str(holder["status"]["artifact"]["uri"])


def _true_since(job: Json) -> Mapping[str, str]:
    """Return the conditions that hold, with the time since when."""
    return {
        condition["type"]: str(condition.get("lastTransitionTime"))
        for condition in (job.get("status") or {}).get("conditions") or []
        if condition.get("status") == "True"
    }
