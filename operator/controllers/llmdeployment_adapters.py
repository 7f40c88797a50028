"""Adapters: which ones a deployment wants, and bringing its running replicas to have them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mizzen.operator.controllers.llmdeployment_replicas import Group
from mizzen.operator.crds.common import Json
from mizzen.operator.desired.adapters import PromotedArtifact, WantedAdapter
from mizzen.operator.planning.promotions import MODEL, choose_holders
from mizzen.operator.planning.rollout import Standing
from mizzen.operator.runtimes import AdapterRefusedError, LoadedAdapter, Runtimes

_CAN_LOAD = (Standing.STARTING, Standing.UNREADY, Standing.IN_SERVICE)


@dataclass(frozen=True, slots=True)
class AdaptersSeen:
    """What the replicas have loaded after this round; replicas are told apart by address."""

    loaded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)  # by adapter
    incomplete: frozenset[str] = frozenset()  # replicas to try again soon
    leftover: frozenset[str] = frozenset()  # replicas that could not drop what nobody wants


@dataclass(frozen=True, slots=True)
class Change:
    """What one replica has to load and to drop."""

    load: tuple[WantedAdapter, ...] = ()
    unload: tuple[str, ...] = ()


def promoted_artifacts(jobs: Iterable[Json]) -> list[PromotedArtifact]:
    """Return the adapters of the jobs that hold an adapter's name."""
    return [
        artifact
        for name, job in choose_holders(jobs).items()
        if name != MODEL and (artifact := _artifact(job, name, kind="adapter"))
    ]


def promoted_model(jobs: Iterable[Json]) -> PromotedArtifact | None:
    """Return the model that is to be served instead of the one in the spec, if there is one."""
    holder = choose_holders(jobs).get(MODEL)
    return None if holder is None else _artifact(holder, MODEL, kind="model")


def _artifact(job: Json, name: str, *, kind: str) -> PromotedArtifact | None:
    artifact = (job.get("status") or {}).get("artifact") or {}
    if artifact.get("kind") != kind or not str(artifact.get("uri")).startswith("pvc://"):
        return None
    promotion = job["status"].get("promotion") or {}
    return PromotedArtifact(
        name,
        artifact["uri"],
        artifact.get("digest"),
        job["metadata"]["name"],
        on_trial="onTrialSince" in promotion,
    )


def plan_change(wanted: Sequence[WantedAdapter], loaded: Sequence[LoadedAdapter]) -> Change:
    """Return what turns the loaded adapters into the wanted ones."""
    digests = {adapter.name: adapter.digest for adapter in loaded}
    return Change(
        load=tuple(
            adapter
            for adapter in wanted
            if adapter.name not in digests
            or (adapter.digest is not None and digests[adapter.name] != adapter.digest)
        ),
        unload=tuple(sorted(digests.keys() - {adapter.name for adapter in wanted})),
    )


async def bring_adapters(
    groups: Iterable[Group], wanted: Sequence[WantedAdapter], runtimes: Runtimes
) -> AdaptersSeen:
    """Load and unload on every replica that can, all at once; one bad adapter stops no other."""
    addresses = [
        group.address
        for group in groups
        if group.standing in _CAN_LOAD and group.has_loaded and group.address
    ]
    rounds = await asyncio.gather(*(_bring(ip, wanted, runtimes) for ip in addresses))
    errors: dict[str, str] = {}
    for one in rounds:
        errors |= one.errors
    return AdaptersSeen(
        loaded={ip: names for one in rounds for ip, names in one.loaded.items()},
        errors=errors,
        incomplete=frozenset().union(*(one.incomplete for one in rounds)),
        leftover=frozenset().union(*(one.leftover for one in rounds)),
    )


async def _bring(ip: str, wanted: Sequence[WantedAdapter], runtimes: Runtimes) -> AdaptersSeen:
    known = await runtimes.adapters(ip)
    if known is None:
        return AdaptersSeen(incomplete=frozenset({ip}))
    change = plan_change(wanted, known)
    missing = {adapter.name for adapter in change.load}
    errors: dict[str, str] = {}
    dropped = [await runtimes.unload_adapter(ip, name) for name in change.unload]
    for adapter in change.load:
        try:
            path, digest = adapter.source.path, adapter.digest
            if await runtimes.load_adapter(ip, adapter.name, path=path, digest=digest):
                missing.discard(adapter.name)
        except AdapterRefusedError as error:
            errors[adapter.name] = str(error)
    names = tuple(adapter.name for adapter in wanted if adapter.name not in missing)
    return AdaptersSeen(
        loaded={ip: names},
        errors=errors,
        incomplete=frozenset({ip}) if missing - errors.keys() else frozenset(),
        leftover=frozenset() if all(dropped) else frozenset({ip}),
    )
