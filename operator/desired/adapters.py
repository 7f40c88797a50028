"""Which adapters a deployment wants, and the file from which its later replicas load them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from mizzen.operator.crds.common import Json
from mizzen.operator.crds.llmdeployment import Adapter
from mizzen.operator.desired import labels
from mizzen.operator.desired.sources import Source, locate

ADAPTERS_VOLUME = "adapters"
ADAPTERS_FOLDER = "/etc/mizzen/adapters"
ADAPTERS_FILE = f"{ADAPTERS_FOLDER}/adapters.json"


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """One adapter that every replica should have loaded."""

    name: str
    source: Source
    digest: str | None = None  # known of published artifacts only
    job: str | None = None  # the FineTuneJob that promoted it
    on_trial: bool = False  # its requests are counted apart and watched

    @property
    def entry(self) -> Json:
        """Its line in the adapters file, which is also what a load call says."""
        return {"name": self.name, "path": self.source.path} | (
            {"digest": self.digest} if self.digest else {}
        )


@dataclass(frozen=True, slots=True)
class PromotedArtifact:
    """A published result of a job that may be served."""

    name: str  # on the deployment
    uri: str
    digest: str | None
    job: str
    on_trial: bool = False


def wanted_adapters(
    written: Iterable[Adapter], promoted: Iterable[PromotedArtifact]
) -> tuple[WantedAdapter, ...]:
    """Return the adapters of the spec and of promoted jobs, by name.

    A name in the spec wins over a job's: what a user wrote is not replaced behind their back.
    """
    wanted = {
        a.name: WantedAdapter(a.name, locate(a.uri), a.digest, a.job, a.on_trial) for a in promoted
    }
    wanted |= {a.name: WantedAdapter(a.name, locate(a.source)) for a in written}
    return tuple(wanted[name] for name in sorted(wanted))


def adapters_name(deployment: str) -> str:
    """Return the name of the ConfigMap with a deployment's adapters."""
    return f"{deployment}-adapters"


def build_adapters(
    deployment: str, *, namespace: str, owner: Json, adapters: Iterable[WantedAdapter]
) -> Json:
    """Return the ConfigMap that a starting replica reads its adapters from."""
    document = json.dumps({"adapters": [adapter.entry for adapter in adapters]}, indent=1)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": adapters_name(deployment),
            "namespace": namespace,
            "labels": labels.deployment_labels(deployment),
            "ownerReferences": [owner],
        },
        "data": {"adapters.json": document},
    }
