"""The arbiter beside a job's reconcile, on an API server in memory: start, give back, queue."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from mizzen.operator.controllers import capacity, finetunejob
from mizzen.operator.controllers.capacity import Arbiter
from mizzen.operator.controllers.capacity_usage import Usage, read_usage
from mizzen.operator.desired import labels
from mizzen.operator.engine.key import Key
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.errors import Conflict
from mizzen.operator.ledger import Ledger
from mizzen.operator.planning.lending import Decision, Hold, Snapshot
from mizzen.operator.planning.placement import Gang
from tests.fixtures.shared_cluster import GPU, JOBS, KEY, NOW, PODS, Cluster, admitted

GROUP_GATES = [{"name": labels.CAPACITY_GATE}, {"name": labels.GROUP_GATE}]


async def test_a_job_starts_on_the_node_it_was_given() -> None:
    cluster = Cluster()
    cluster.submit()
    await cluster.look()
    pod = cluster.pod("tune-g1-0")
    assert pod is not None
    assert pod["spec"]["nodeSelector"] == {labels.HOSTNAME: "host-a"}


async def test_a_job_waits_where_nothing_is_spare_and_says_so() -> None:
    cluster = Cluster()
    cluster.replica("one", node="a")
    cluster.replica("two", node="a")
    cluster.submit()
    status = await cluster.look()
    assert cluster.pod("tune-g1-0") is None
    assert status["phase"] == "Pending"
    assert admitted(status) == ("False", "NoSpareCapacity")


async def test_a_replica_is_let_in_once_the_job_has_left_and_the_job_waits() -> None:
    cluster = Cluster()
    cluster.replica("one", node="a")
    cluster.submit()
    await cluster.look()
    cluster.run("tune-g1-0")
    cluster.replica("two", is_gated=True)
    status = await cluster.look()
    assert status["phase"] == "Yielding"
    assert admitted(status) == ("False", "Yielded")
    assert status["lending"]["preemptions"] == 1
    waiting = cluster.pod("two")
    assert waiting is not None and waiting["spec"]["schedulingGates"]
    assert labels.WAITS_SINCE in waiting["metadata"]["annotations"]
    assert Key("llmdeployment", "team", "chat") in cluster.changed

    # It does not leave in time, so its pod is ended where it is.
    cluster.now += timedelta(seconds=31)
    status = await cluster.look()
    assert status["lending"]["slowestYieldSeconds"] == 31.0
    cluster.api.objects.pop(f"{PODS}/tune-g1-0", None)
    cluster.world.restart_operator()
    object.__setattr__(cluster.world.facts, "ledger", cluster.facts.ledger)
    cluster.facts = cluster.world.facts
    cluster.arbiter = Arbiter(
        kube=cluster.world.kube,
        facts=cluster.facts,
        notes=cluster.notes,
        on_change=lambda key: None,
    )
    status = await cluster.look()
    let_in = cluster.pod("two")
    assert let_in is not None and not let_in["spec"].get("schedulingGates")
    assert let_in["spec"]["nodeSelector"] == {labels.HOSTNAME: "host-a"}
    assert admitted(status) == ("False", "YieldTooSlow")


async def test_a_gate_is_opened_when_no_job_is_left() -> None:
    cluster = Cluster()
    cluster.replica("two", is_gated=True)
    await cluster.arbiter.look(now=NOW)
    pod = cluster.pod("two")
    assert pod is not None and not pod["spec"].get("schedulingGates")


async def test_without_a_right_to_see_nodes_only_jobs_that_keep_their_devices_start() -> None:
    cluster = Cluster()
    object.__setattr__(cluster.facts, "ledger", Ledger(sees_nodes=False))
    cluster.submit()
    await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    assert admitted(cluster.api.objects[f"{JOBS}/tune"]["status"]) == ("False", "NodesUnknown")
    cluster.submit(enabled=False)
    cluster.facts.specs.forget(cluster.api.objects[f"{JOBS}/tune"])
    await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    assert cluster.pod("tune-g1-0") is not None


async def test_nobody_looks_at_the_cluster_for_a_suspended_job_once_it_holds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster()
    cluster.submit()
    await cluster.look()
    cluster.run("tune-g1-0")
    cluster.api.objects[f"{JOBS}/tune"]["spec"]["suspend"] = True
    listed: list[str] = []
    list_all = Kube.list

    async def note(kube: Kube, api_version: str, kind: str, **more: Any) -> Any:
        listed.append(kind)
        return await list_all(kube, api_version, kind, **more)

    monkeypatch.setattr(Kube, "list", note)
    await cluster.look()
    assert listed == ["Node", "Pod"] and cluster.facts.ledger.shared == {GPU}, "it still trains"
    cluster.leave("tune-g1-0", at="2026-09-01T12:10:04Z")
    listed.clear()
    await cluster.look()
    assert listed == [] and cluster.facts.ledger.shared == frozenset()
    cluster.api.objects[f"{JOBS}/tune"]["spec"]["suspend"] = False
    cluster.facts.specs.forget(cluster.api.objects[f"{JOBS}/tune"])
    await cluster.look()
    assert listed == ["Node", "Pod"] and cluster.facts.ledger.shared == {GPU}


async def test_a_job_that_left_in_time_goes_on_when_the_replica_is_gone() -> None:
    cluster = Cluster()
    cluster.replica("one", node="a")
    cluster.submit()
    await cluster.look()
    cluster.run("tune-g1-0")
    cluster.replica("two", is_gated=True)
    await cluster.look()
    cluster.leave("tune-g1-0", at="2026-09-01T12:10:04Z")
    cluster.now += timedelta(seconds=5)
    status = await cluster.look()
    assert not cluster.is_gated("two")
    assert status["lending"]["slowestYieldSeconds"] == 4.0
    assert admitted(status) == ("False", "Yielded")
    assert status["checkpoint"]["step"] == 7

    cluster.api.drop(f"{PODS}/two")
    cluster.restart_operator()
    cluster.now += timedelta(seconds=30)
    status = await cluster.look()
    again = cluster.pod("tune-g2-0")
    assert again is not None
    assert again["spec"]["nodeSelector"] == {labels.HOSTNAME: "host-a"}
    assert again["metadata"]["annotations"][labels.PREEMPTIONS] == "1"


async def test_a_job_does_not_start_on_devices_that_a_look_gives_away_meanwhile() -> None:
    cluster = Cluster()
    cluster.replica("one", node="a")
    cluster.submit()
    await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    await cluster.arbiter.look(now=NOW)
    ledger = cluster.facts.ledger
    assert KEY in ledger.admitted
    has_answer = asyncio.Event()
    cluster.api.fault = lambda method, path: has_answer.set()
    async with ledger.handing_out:
        looking = asyncio.create_task(cluster.arbiter.look(now=NOW))
        starting = asyncio.create_task(
            finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
        )
        await has_answer.wait()  # its first write, its pod's ConfigMap, comes of the old answer
        cluster.replica("two", is_gated=True)
    await asyncio.gather(looking, starting)
    assert not cluster.is_gated("two")
    assert cluster.pod("tune-g1-0") is None
    status = cluster.api.objects[f"{JOBS}/tune"]["status"]
    assert status["phase"] == "Pending"
    assert admitted(status) == ("False", "NoSpareCapacity")


async def test_a_gang_half_made_by_an_operator_that_died_needs_only_the_rest() -> None:
    cluster = Cluster()
    cluster.submit(workers=2)

    def die(method: str, path: str) -> None:
        if method == "POST" and path == PODS and cluster.pod("tune-g1-0"):
            raise ConnectionError

    cluster.api.fault = die
    await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    await cluster.arbiter.look(now=NOW)
    with pytest.raises(ConnectionError):
        await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    cluster.api.fault = lambda method, path: None
    cluster.restart_operator()
    await cluster.look()
    for name in ("tune-g1-0", "tune-g1-1"):
        pod = cluster.pod(name)
        assert pod is not None
        assert pod["spec"]["nodeSelector"] == {labels.HOSTNAME: "host-a"}


async def test_a_generation_made_smaller_keeps_the_places_it_has() -> None:
    cluster = Cluster()
    cluster.submit(workers=2)
    await cluster.look()
    placed = cluster.pod("tune-g1-1")
    assert placed is not None
    cluster.api.put(f"{PODS}/tune-g1-1", placed | {"spec": placed["spec"] | {"nodeName": "a"}})
    cluster.now += timedelta(minutes=5)
    await cluster.look()
    alone = cluster.pod("tune-g2-0")
    assert alone is not None and cluster.pod("tune-g2-1") is None
    assert alone["spec"]["nodeSelector"] == {labels.HOSTNAME: "host-a"}


async def test_a_replica_of_two_pods_is_let_in_whole_and_only_when_all_are_there() -> None:
    cluster = Cluster()
    cluster.submit()  # so that there is somebody to share with
    await cluster.look()
    cluster.run("tune-g1-0")
    cluster.replica("big-0", is_gated=True, schedulingGates=GROUP_GATES)
    await cluster.look()
    assert cluster.is_gated("big-0")
    assert cluster.pod("tune-g1-0")["metadata"]["annotations"].get(labels.RECLAIMED_AT) is None

    cluster.api.drop(f"{PODS}/big-0")
    cluster.replica("big-0", is_gated=True)
    cluster.replica("big-1", is_gated=True, rank=1)
    await cluster.look()
    assert cluster.is_gated("big-0") and cluster.is_gated("big-1"), "one alone had room"
    cluster.leave("tune-g1-0", at="2026-09-01T12:10:04Z")
    await cluster.look()
    assert not cluster.is_gated("big-0") and not cluster.is_gated("big-1")


async def test_a_replica_that_its_user_pinned_to_a_node_is_let_in_there() -> None:
    cluster = Cluster()
    cluster.submit()
    cluster.replica("two", is_gated=True, nodeSelector={labels.HOSTNAME: "host-a"})
    await cluster.look()
    assert not cluster.is_gated("two")


async def test_a_replica_goes_where_its_selector_and_tolerations_let_it() -> None:
    cluster = Cluster()
    spare = {"key": "dedicated", "value": "chat", "effect": "NoSchedule"}
    cluster.node("b", taints=[spare], pool="h100")
    cluster.node("c", pool="l4")
    cluster.submit()
    selector = {"pool": "h100"}
    cluster.replica("one", is_gated=True, nodeSelector=selector, tolerations=[spare])
    cluster.replica("two", is_gated=True, nodeSelector=selector)
    await cluster.look()
    bound = cluster.pod("one")
    assert bound is not None and not cluster.is_gated("one")
    assert bound["spec"]["nodeSelector"] == {**selector, labels.HOSTNAME: "host-b"}
    missing = cluster.pod("two")
    assert missing is not None and not cluster.is_gated("two"), "the scheduler says what is missing"
    assert missing["spec"]["nodeSelector"] == selector


AFFINITY = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {}}}


async def test_pods_with_an_affinity_are_let_in_and_their_node_is_left_to_the_scheduler() -> None:
    cluster = Cluster()
    cluster.submit(patch={"affinity": AFFINITY})
    cluster.replica("two", is_gated=True, affinity=AFFINITY)
    await cluster.look()
    trainer, replica = cluster.pod("tune-g1-0"), cluster.pod("two")
    assert trainer is not None and replica is not None
    assert not cluster.is_gated("two")
    assert "nodeSelector" not in trainer["spec"] and "nodeSelector" not in replica["spec"]


@pytest.mark.parametrize(("pool", "left"), [("one", "host-b"), ("other", "host-a")])
@pytest.mark.parametrize("phase", ["", "Failed"])
async def test_what_is_kept_for_a_deployment_is_kept_where_its_pods_may_go(
    pool: str, left: str, phase: str
) -> None:
    cluster = Cluster()
    cluster.node("a", pool="one")
    cluster.node("b", pool="other")
    cluster.world.change(
        scaling={"min": 0, "max": 1, "reserve": 1},
        accelerator={"resource": GPU, "count": 2},
        podTemplatePatch={"nodeSelector": {"pool": pool}},
    )
    if phase:  # a replica that ended counts as none
        cluster.replica("smollm2-0", node="a")
        ended = cluster.pod("smollm2-0")
        assert ended is not None
        ended["metadata"]["labels"][labels.DEPLOYMENT] = "smollm2"
        cluster.api.put(f"{PODS}/smollm2-0", ended | {"status": {"phase": phase}})
    cluster.submit(workers=2)
    await cluster.look()
    for name in ("tune-g1-0", "tune-g1-1"):
        pod = cluster.pod(name)
        assert pod is not None
        assert pod["spec"]["nodeSelector"] == {labels.HOSTNAME: left}


async def test_a_write_that_is_refused_holds_up_nobody_else() -> None:
    cluster = Cluster()
    cluster.submit()
    cluster.replica("bad", is_gated=True)
    cluster.replica("good", is_gated=True)

    def refuse(method: str, path: str) -> None:
        if path.endswith("/bad"):
            raise Conflict(status=409)

    cluster.api.fault = refuse
    status = await cluster.look()
    assert cluster.is_gated("bad") and not cluster.is_gated("good")
    assert admitted(status) == ("False", "NoSpareCapacity")
    cluster.api.fault = lambda method, path: None
    await cluster.look()
    assert not cluster.is_gated("bad")


async def test_a_job_that_asks_for_more_before_it_starts_waits_for_the_whole_of_it() -> None:
    cluster = Cluster()
    cluster.submit()
    await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    await cluster.arbiter.look(now=NOW)
    assert cluster.facts.ledger.admitted[KEY] == ("host-a",)
    cluster.submit(workers=2)
    cluster.facts.specs.forget(cluster.api.objects[f"{JOBS}/tune"])
    await cluster.look()
    for name in ("tune-g1-0", "tune-g1-1"):
        pod = cluster.pod(name)
        assert pod is not None
        assert pod["spec"]["nodeSelector"] == {labels.HOSTNAME: "host-a"}


async def test_an_answer_to_what_a_job_asked_before_the_look_ended_is_dropped() -> None:
    cluster = Cluster()
    cluster.submit()
    cluster.replica("two", is_gated=True)
    await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    ledger = cluster.facts.ledger
    asked = ledger.requests[KEY]

    def ask_for_more(method: str, path: str) -> None:
        if path.endswith("/two"):
            ledger.ask(KEY, replace(asked, job=replace(asked.job, gang=Gang(2, 1))))

    cluster.api.fault = ask_for_more
    await cluster.arbiter.look(now=NOW)
    assert not cluster.is_gated("two")
    assert KEY not in ledger.admitted
    await cluster.arbiter.look(now=NOW)  # one device is left, and two are asked for now
    wait = ledger.wait_of(KEY)
    assert wait is not None and wait.hold is Hold.NO_ROOM


async def test_status_names_the_nodes_of_all_workers() -> None:
    cluster = Cluster()
    cluster.node("b")
    cluster.replica("one", node="a")
    cluster.replica("two", node="b")
    cluster.submit(workers=2)
    await cluster.look()
    for name, node in (("tune-g1-0", "b"), ("tune-g1-1", "a")):
        pod = cluster.pod(name)
        assert pod is not None
        cluster.api.put(f"{PODS}/{name}", pod | {"spec": pod["spec"] | {"nodeName": node}})
        cluster.run(name)
    status = await cluster.look()
    assert status["lending"]["nodes"] == ["b", "a"]


async def test_no_borrower_leaves_while_another_replica_is_on_its_way_out() -> None:
    cluster = Cluster()
    cluster.replica("one", node="a")
    cluster.submit()
    await cluster.look()
    cluster.run("tune-g1-0")
    leaving = cluster.pod("one")
    assert leaving is not None
    gone_by = "2026-09-01T12:11:00Z"
    metadata = leaving["metadata"] | {"deletionTimestamp": gone_by}
    cluster.api.put(f"{PODS}/one", leaving | {"metadata": metadata})
    cluster.replica("two", is_gated=True)
    status = await cluster.look()
    assert cluster.is_gated("two")
    assert status["lending"]["preemptions"] == 0
    cluster.now += timedelta(minutes=3)  # it is stuck, so somebody else has to
    status = await cluster.look()
    assert status["lending"]["preemptions"] == 1


async def test_what_a_namespace_used_is_known_to_the_operator_that_comes_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[float] = []
    lend = capacity.lend

    def note(snapshot: Snapshot, **more: Any) -> Decision:
        told.append(snapshot.used_s.get("team", 0.0))
        return lend(snapshot, **more)

    monkeypatch.setattr(capacity, "lend", note)
    cluster = Cluster()
    cluster.submit(workers=2)
    await cluster.look()
    for name in ("tune-g1-0", "tune-g1-1"):
        cluster.run(name)
    cluster.now += timedelta(seconds=100)
    await cluster.look()
    assert told[-2:] == [0.0, 200.0]
    cluster.restart_operator()
    await cluster.look()
    assert told[-1] == 200.0
    # The trainers did not stop for the operator.
    cluster.restart_operator()
    cluster.now += timedelta(seconds=100)
    await cluster.look()
    assert told[-1] == pytest.approx(400.0, rel=1e-3)


async def test_what_was_used_of_a_resource_fades_also_while_only_others_are_in_use() -> None:
    cluster = Cluster()
    earlier = Usage({"other.example.com/gpu": {"team": 1000.0}}, NOW - timedelta(days=1))
    cluster.notes.note(labels.USAGE, earlier.to_text())
    cluster.submit()
    await cluster.look()
    left = read_usage(cluster.notes.noted(labels.USAGE))
    assert left == Usage({"other.example.com/gpu": {"team": 500.0}}, NOW)


@pytest.mark.parametrize("phase", ["Running", "Pending", "Succeeded"])
async def test_devices_of_a_strangers_pod_are_given_to_nobody_until_it_has_ended(
    phase: str,
) -> None:
    cluster = Cluster()
    path = "/api/v1/namespaces/strangers/pods/notebook"
    stranger = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": "strangers", "name": "notebook"},
        "spec": {"nodeName": "a", "containers": [{"resources": {"limits": {GPU: "2"}}}]},
        "status": {"phase": phase},
    }
    cluster.api.put(path, stranger)
    cluster.submit()
    status = await cluster.look()
    if phase != "Succeeded":
        assert cluster.pod("tune-g1-0") is None
        assert admitted(status) == ("False", "NoSpareCapacity")
        cluster.replica("two", is_gated=True)
        await cluster.look()
        replica = cluster.pod("two")
        assert replica is not None
        assert "nodeSelector" not in replica["spec"], "it is bound to no node: none has room"
        cluster.api.drop(f"{PODS}/two")
        cluster.api.put(path, stranger | {"status": {"phase": "Failed"}})
        await cluster.look()
    assert cluster.pod("tune-g1-0") is not None
    untouched = cluster.api.objects[path]
    assert "annotations" not in untouched["metadata"]
