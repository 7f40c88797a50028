"""What happens to the resources of a cluster, as lines that a person reads, each with its time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Story:
    """Prints what changes, with the seconds since the beginning."""

    begun: float = field(default_factory=time.monotonic)
    told: dict[str, str] = field(default_factory=dict)

    @property
    def now_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begun

    def say(self, text: str) -> None:
        """Print one line of the record."""
        print(f"{self.now_s:7.1f} s  {text}", flush=True)

    def tell(self, resource: Json) -> None:
        """Say how a resource is, if that is news."""
        self._tell(f"{resource['kind']}/{resource['metadata']['name']}", in_short(resource))

    def tell_gone(self, name: str) -> None:
        """Say that a resource, by its kind and name, is not there any more."""
        self._tell(name, "gone")

    def _tell(self, name: str, text: str) -> None:
        if text and self.told.get(name) != text:
            self.told[name] = text
            self.say(f"{name}: {text}")


def in_short(resource: Json) -> str:
    """Return what a person would want to know of a resource's status."""
    status = resource.get("status") or {}
    if resource["kind"] == "Pod":
        return pod_in_short(resource, status)
    told = {c["type"]: c for c in status.get("conditions") or []}
    if resource["kind"] == "LLMDeployment":
        wanted = (status.get("scaling") or {}).get("desired", resource["spec"].get("replicas"))
        adapters = [f"{a['name']} of {a.get('job')}" for a in status.get("adapters") or []]
        ready = told.get("Ready", {}).get("reason")
        return f"{status.get('ready')} ready, {wanted} wanted, {ready}; adapters {adapters}"
    parts = [str(status.get("phase")), *_flags(told)]
    made = (status.get("progress") or {}).get("step")
    if made is not None:
        is_waiting = status.get("phase") == "Pending"
        # While it is at work, every tenth step is enough to see it go on.
        parts.insert(1, f"committed step {made}" if is_waiting else f"past step {made // 10 * 10}")
    return ", ".join(parts)


def pod_in_short(pod: Json, status: Json) -> str:
    """Return where a pod is between its creation and its end."""
    if pod["metadata"].get("deletionTimestamp"):
        return "leaving"
    if gates := pod["spec"].get("schedulingGates"):
        return f"held by {', '.join(gate['name'] for gate in gates)}"
    ends = [c["state"].get("terminated") for c in status.get("containerStatuses") or []]
    if any(ends):
        return "ended, exit code " + ", ".join(str(end["exitCode"]) for end in ends if end)
    told = {c["type"]: c["status"] for c in status.get("conditions") or []}
    ready = "in service" if told.get("Ready") == "True" else "not in service"
    return f"{status.get('phase')}, {ready}"


def _flags(told: dict[str, Json]) -> Iterator[str]:
    for name in ("Admitted", "EvaluationPassed", "Promoted", "Failed"):
        condition = told.get(name)
        if condition and condition["reason"] not in ("Pending", "AsExpected", "NoPromotion"):
            yield f"{name} {condition['status']} ({condition['reason']})"
