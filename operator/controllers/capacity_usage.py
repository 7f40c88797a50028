"""How much each namespace has used of late, and that as a text which outlives the operator. Pure.

The text goes with the Lease, from leader to leader, so who had much stays behind who had little.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from mizzen.operator.status.conditions import parse_rfc3339, rfc3339

# The API server takes 256 KiB of annotations, and a Lease that it refuses costs the lead.
_MOST = 200


@dataclass(frozen=True, slots=True)
class Usage:
    """Device-seconds by resource and namespace, as of a look at the cluster."""

    used_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    looked_at: datetime | None = None

    def elapsed_s(self, now: datetime) -> float:
        """Return the seconds since the look; none where a clock was set back, or another's is."""
        return max(0.0, (now - self.looked_at).total_seconds()) if self.looked_at else 0.0

    def to_text(self) -> str:
        """Return it as JSON in whole seconds, of the namespaces that used most."""
        entries = [
            (round(seconds), resource, namespace)
            for resource, namespaces in self.used_s.items()
            for namespace, seconds in namespaces.items()
        ]
        kept: dict[str, dict[str, int]] = {}
        for seconds, resource, namespace in sorted(entries, reverse=True)[:_MOST]:
            kept.setdefault(resource, {})[namespace] = seconds
        looked_at = rfc3339(self.looked_at) if self.looked_at else None
        return json.dumps({"lookedAt": looked_at, "usedSeconds": kept})


def read_usage(text: str) -> Usage:
    """Return what a leader left; nothing where that cannot be read, for devices matter more."""
    try:
        document = json.loads(text)
        looked_at = parse_rfc3339(document["lookedAt"])
        used_s = {
            str(resource): {str(name): float(int(seconds)) for name, seconds in names.items()}
            for resource, names in document["usedSeconds"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return Usage()
    return Usage(used_s, looked_at) if looked_at.tzinfo else Usage()
