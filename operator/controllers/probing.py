"""Asks a replica for the answer that tells whether what it serves talks sense."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from mizzen.operator.crds import rollout
from mizzen.operator.planning.canary import Probe
from mizzen.operator.runtimes import Runtimes

_SHOWN_CHARS = 200


async def ask_probes(
    runtimes: Runtimes, address: str, model: str, probes: Sequence[rollout.Probe]
) -> list[tuple[Probe, str]]:
    """Ask all of them at once, so that a slow replica takes the time of one; answer in order."""
    asked = (ask_probe(runtimes, address, model, probe) for probe in probes)
    return await asyncio.gather(*asked)


async def ask_probe(
    runtimes: Runtimes, address: str, model: str, probe: rollout.Probe
) -> tuple[Probe, str]:
    """Return what came of the probe prompt, and the beginning of an answer nobody expected.

    `model` is its name on the replica: the deployment's served name, or an adapter's.
    """
    said = await runtimes.complete(address, model, probe.prompt, max_tokens=probe.max_tokens)
    if said is None:
        return Probe.NO_ANSWER, ""
    if re.search(probe.expect, said):
        return Probe.PASSED, ""
    return Probe.UNEXPECTED, said[:_SHOWN_CHARS]
