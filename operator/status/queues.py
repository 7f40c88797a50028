"""What Kueue says of a job that waits in one of its queues. Pure."""

from __future__ import annotations

from mizzen.operator.crds.common import Json
from mizzen.operator.planning.lending import Hold, Wait
from mizzen.operator.status.job_facts import Problem
from mizzen.operator.status.reasons import Reason


def wait_in_queue(queue: str, workload: Json | None) -> Wait:
    """Return why Kueue holds a job's pods back; `workload` is its record of them."""
    return Wait(Hold.IN_QUEUE, f"The job waits in queue {queue}: {_last_word(workload)}")


def _last_word(workload: Json | None) -> str:
    conditions = ((workload or {}).get("status") or {}).get("conditions") or []
    said = {each["type"]: each for each in conditions if each.get("message")}
    for type_ in ("QuotaReserved", "Admitted"):
        if type_ in said and said[type_]["status"] == "False":
            return str(said[type_]["message"])
    if "QuotaReserved" in said:
        return "it has quota, and the queue's admission checks have not all passed yet."
    return "Kueue has not looked at it yet."


def kueue_missing(queue: str) -> Problem:
    """Return what a job says whose queue nobody serves."""
    return Problem(
        Reason.KUEUE_NOT_INSTALLED,
        f"spec.queue names {queue}, but Kueue is not installed in this cluster. Install it, or "
        "submit the job without spec.queue.",
    )


def queue_missing(queue: str) -> Problem:
    """Return what a job says whose queue is not there."""
    return Problem(
        Reason.QUEUE_NOT_FOUND,
        f"spec.queue names {queue}, but this namespace has no LocalQueue of that name. Create it, "
        "or submit the job with another spec.queue.",
    )
