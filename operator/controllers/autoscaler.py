"""The one loop that sizes every deployment with `spec.scaling`: look, decide, say it in status.

It writes `status.scaling` under a field manager of its own and makes the deployment's key due;
the replicas themselves are made and drained by the deployment's reconcile. A loop and not a
reconcile per deployment, because one look at the metrics serves all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from mizzen.operator.controllers.autoscaler_observe import (
    find_scaled,
    observation_of,
    target_of,
    wake_of,
)
from mizzen.operator.controllers.autoscaler_rivals import Rivals
from mizzen.operator.controllers.llmdeployment_replicas import Group, read_groups
from mizzen.operator.controllers.scaling_rules import rules_of
from mizzen.operator.crds import llmdeployment
from mizzen.operator.crds.common import Json
from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.operator.engine.key import Key
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import uid_of
from mizzen.operator.kube.errors import KubeError
from mizzen.operator.metrics.figures import Measured
from mizzen.operator.metrics.source import MetricsSource
from mizzen.operator.planning.scale import History, decide
from mizzen.operator.planning.scale_rules import ScaleRules
from mizzen.operator.planning.schedule import UnknownTimeZoneError
from mizzen.operator.routing import DEPLOYMENT
from mizzen.operator.specs import InvalidSpecError
from mizzen.operator.status.reasons import Reason
from mizzen.operator.status.scaling import (
    SCALING,
    history_of,
    is_worth_writing,
    scaling_document,
    state_of,
    time_zone_document,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """A deployment that scales, as it stands."""

    key: Key
    resource: Json
    spec: LLMDeploymentSpec
    rules: ScaleRules
    is_dry_run: bool
    groups: tuple[Group, ...]


class Autoscaler:
    """The loop and what it remembers of each deployment, by uid."""

    def __init__(
        self,
        *,
        kube: Kube,
        facts: Facts,
        source: MetricsSource,
        on_change: Callable[[Key], None],
    ) -> None:
        self._kube = kube
        self._facts = facts
        self._source = source
        self._on_change = on_change
        self._rivals = Rivals(facts.config.watch_namespaces)
        self._histories: dict[str, History] = {}
        self._nudged: set[Key] = set()
        self._is_nudged = asyncio.Event()

    def notice(self, key: Key) -> None:
        """Have a deployment looked at soon where it is new here, or a gateway woke it."""
        resource = find_scaled(key, self._facts)
        if resource is None:
            return
        history = self._histories.get(uid_of(resource))
        if history is None or history.wake_token != wake_of(resource).token:
            self._nudged.add(key)
            self._is_nudged.set()

    async def run(self, *, every_s: float, clock: Callable[[], datetime]) -> None:
        """Look at everything every few seconds, and at once at what was noticed meanwhile."""
        due = 0.0
        loop = asyncio.get_running_loop()
        while True:
            wait_s = max(0.0, due - loop.time())
            try:
                await asyncio.wait_for(self._is_nudged.wait(), timeout=wait_s)
            except TimeoutError:
                due = loop.time() + every_s
                keys = None
            else:
                keys = frozenset(self._nudged)
            self._nudged.clear()
            self._is_nudged.clear()
            try:
                await self.look(now=clock(), only=keys)
            except Exception:
                # A defect of ours must not end the loop that all deployments need.
                logger.exception("the autoscaler's look failed")

    async def look(self, *, now: datetime, only: frozenset[Key] | None = None) -> None:
        """Decide for every deployment that scales, or only for these."""
        scaled = []
        for resource in self._facts.store.all(llmdeployment.KIND):
            metadata = resource["metadata"]
            key = Key(DEPLOYMENT, metadata["namespace"], metadata["name"])
            if only is not None and key not in only:
                continue
            if find_scaled(key, self._facts) is None:
                await self._forget(key, resource)
            elif one := self._read(key, resource, now):
                scaled.append(one)
        if only is None:
            living = {uid_of(r) for r in self._facts.store.all(llmdeployment.KIND)}
            for uid in self._histories.keys() - living:
                del self._histories[uid]
        if not scaled:
            return
        targets = [target_of(one.key, one.groups, one.rules.slo, now=now) for one in scaled]
        measured = await self._source.collect(targets)
        rivals = await self._rivals.find(self._kube, now=now)
        for one in scaled:
            name = one.key.namespace, one.key.name
            try:
                await self._decide(one, measured[name], rivals.get(name, ""), now=now)
            except Exception:
                # A defect that one deployment meets must not keep the others from being sized.
                logger.exception("cannot size a deployment", extra={"key": str(one.key)})

    def _read(self, key: Key, resource: Json, now: datetime) -> Scaled | None:
        try:
            spec = self._facts.specs.deployment(resource)
        except InvalidSpecError:
            return None  # the deployment's own reconcile says so
        if spec.scaling is None:
            return None
        pods = self._facts.store.children(key, "Pod")
        groups = tuple(read_groups(pods, owner_uid=uid_of(resource), now=now))
        return Scaled(
            key=key,
            resource=resource,
            spec=spec,
            rules=rules_of(spec, spec.scaling, scrape_s=self._facts.config.metrics_interval_s),
            is_dry_run=spec.scaling.dry_run,
            groups=groups,
        )

    async def _decide(self, one: Scaled, measured: Measured, rival: str, *, now: datetime) -> None:
        uid = uid_of(one.resource)
        previous: Json | None = (one.resource.get("status") or {}).get(SCALING)
        observation = observation_of(one.resource, one.groups, measured, now=now)
        history = self._histories.get(uid) or history_of(
            previous, running=len(observation.replicas)
        )
        try:
            decision = decide(history, observation, one.rules)
        except UnknownTimeZoneError as error:
            desired = _frozen(one.spec, previous, history)
            document = time_zone_document(previous, str(error), desired=desired, now=now)
            await self._write(one, previous, document, now)
            return
        state = state_of(decision, is_dry_run=one.is_dry_run, rival=rival)
        is_frozen = state[0] in (Reason.OTHER_AUTOSCALER, Reason.SCALING_DRY_RUN)
        desired = _frozen(one.spec, previous, history) if is_frozen else decision.replicas
        if rival:
            # What would have been done is no move: nothing follows it.
            state_now = replace(decision.state, desired=desired, moves=history.moves)
            decision = replace(decision, state=state_now)
        document = scaling_document(
            previous, decision, desired=desired, state=state, is_dry_run=is_frozen
        )
        if await self._write(one, previous, document, now):
            self._histories[uid] = decision.state

    async def _write(
        self, one: Scaled, previous: Json | None, document: Json, now: datetime
    ) -> bool:
        """Write the answer where that is worth it; return whether status says it now."""
        if not is_worth_writing(previous, document, now_s=now.timestamp()):
            return True
        try:
            await self._kube.apply_status_field(one.resource, SCALING, document)
        except KubeError as error:
            # Decided anew next time, from the same history: nothing is lost but seconds.
            logger.warning(
                "status.scaling was not written",
                extra={"key": str(one.key), "error": str(error)},
            )
            return False
        self._on_change(one.key)
        return True

    async def _forget(self, key: Key, resource: Json) -> None:
        """Take the answer away from a deployment that scales no more."""
        self._histories.pop(uid_of(resource), None)
        if SCALING not in (resource.get("status") or {}):
            return
        try:
            await self._kube.apply_status_field(resource, SCALING, None)
        except KubeError as error:
            logger.warning(
                "status.scaling stays for now", extra={"key": str(key), "error": str(error)}
            )


def _frozen(
    spec: LLMDeploymentSpec, previous: Mapping[str, object] | None, history: History
) -> int:
    """Return what is run while the answer is not followed: what ran before."""
    before = previous.get("desired") if previous else history.desired
    return spec.wanted_replicas(int(str(before)) if before is not None else None)
