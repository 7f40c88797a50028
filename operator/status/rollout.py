"""The rollout's part of a deployment's status: what is remembered of it, and what is told. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from mizzen.operator.crds.common import Json
from mizzen.operator.planning.course import Canary, Failure, GivenUp, Rollout
from mizzen.operator.status.causes import Cause
from mizzen.operator.status.conditions import Document, parse_rfc3339, rfc3339
from mizzen.operator.status.reasons import Reason

ROLLOUT = "rollout"


def rollout_document(rollout: Rollout) -> Document:
    """Return the field to write."""
    document: Document = {"revision": rollout.revision, "movedAt": rfc3339(rollout.moved_at)}
    if rollout.stable:
        document["stable"] = rollout.stable
    if rollout.serving:
        document["serving"] = rollout.serving
    if rollout.is_paused:
        document["paused"] = True
    if rollout.in_place_refused:
        document["inPlaceRefused"] = rollout.in_place_refused[:512]
    if canary := rollout.canary:
        document["canary"] = _canary_document(canary)
    if failure := rollout.failure:
        document["failure"] = {
            "reason": failure.reason.value,
            "message": failure.message[:1024],
            "at": rfc3339(failure.at),
        }
    return document


def read_rollout(status: Mapping[str, object]) -> Rollout | None:
    """Return what a status says of a rollout, None where there is none."""
    document = status.get(ROLLOUT)
    if not isinstance(document, dict):
        return None
    return Rollout(
        revision=document["revision"],
        stable=document.get("stable", ""),
        moved_at=parse_rfc3339(document["movedAt"]),
        serving=document.get("serving", 0),
        is_paused=document.get("paused", False),
        in_place_refused=document.get("inPlaceRefused", ""),
        canary=_read_canary(document.get("canary")),
        failure=_read_failure(document.get("failure")),
    )


def _canary_document(canary: Canary) -> Document:
    document: Document = {"step": canary.step, "weight": canary.weight}
    if canary.since:
        document["since"] = rfc3339(canary.since)
    if canary.passed:
        document["passed"] = canary.passed[:512]
    return document


def _read_canary(document: Json | None) -> Canary | None:
    if document is None:
        return None
    since = document.get("since")
    return Canary(
        document["step"],
        document["weight"],
        parse_rfc3339(since) if since else None,
        document.get("passed", ""),
    )


def _read_failure(document: Json | None) -> Failure | None:
    if document is None:
        return None
    at = parse_rfc3339(document["at"])
    return Failure(GivenUp(document["reason"]), document["message"], at)


def rollback_cause(rollout: Rollout | None) -> Cause | None:
    """Return what people are told of a revision that was given up."""
    if rollout is None or rollout.failure is None:
        return None
    message = (
        f"Revision {rollout.revision} was rolled back to {rollout.stable}: "
        f"{rollout.failure.message} It is tried again when the spec changes."
    )
    return Cause(Reason.ROLLED_BACK, message[:4096])
