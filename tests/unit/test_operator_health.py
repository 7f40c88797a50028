"""When the operator's process counts as stuck, so that its liveness probe has it restarted."""

from __future__ import annotations

import asyncio

import pytest

from mizzen.operator.config import OperatorConfig
from mizzen.operator.engine.key import Key
from mizzen.operator.engine.lease import Lease
from mizzen.operator.engine.workqueue import WorkQueue
from mizzen.operator.health import Health
from mizzen.operator.kube.leases import LeaseObject
from mizzen.operator.kube.store import Store
from mizzen.operator.routing import route
from mizzen.operator.runtimes import LONGEST_CALL_S
from mizzen.operator.telemetry import Telemetry
from tests.fixtures.memory_api import MemoryApi

pytestmark = pytest.mark.looptime
A, B = Key("llmdeployment", "team", "a"), Key("llmdeployment", "team", "b")


def health(queue: WorkQueue) -> Health:
    lease = Lease(LeaseObject(MemoryApi(), "mizzen-system", "mizzen-operator"), "here")
    config = OperatorConfig(stuck_after_s=120)
    return Health(config, queue, lease, Store(route), Telemetry())


async def test_a_due_key_that_nobody_takes_is_a_problem() -> None:
    queue = WorkQueue()
    queue.add(A)
    await asyncio.sleep(119)
    assert health(queue).problem() == ""
    await asyncio.sleep(2)
    assert health(queue).problem() == "work stands still for 121 s"


async def test_a_reconcile_may_wait_for_a_runtime_that_reads_large_weights() -> None:
    queue = WorkQueue()
    queue.add(A)
    await queue.get()
    await asyncio.sleep(LONGEST_CALL_S + 119)
    assert health(queue).problem() == ""
    await asyncio.sleep(2)
    assert health(queue).problem() == "work stands still for 121 s"
