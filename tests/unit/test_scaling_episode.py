"""The recorded scaling episode: its simulated replicas report what they do, its lines are short."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession, web
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.scaling_episode import Episode, account, is_in_service
from benchmarks.simulated_replicas import (
    OUTPUT_TOKENS,
    PROMPT_TOKEN_S,
    PROMPT_TOKENS,
    SEQUENCE_S,
    STEP_S,
    Fleet,
    Replica,
    Request,
    scrape_configuration,
)

Json = dict[str, Any]


def test_a_request_costs_steps_and_their_parts() -> None:
    ends: list[None] = []
    replica = Replica(now=100.0, on_end=lambda: ends.append(None))
    replica.waiting.append(Request(arrived_at=100.0))
    replica.compute_until(1000.0)
    assert len(ends) == 1 and not replica.running
    stats = replica.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (PROMPT_TOKENS, OUTPUT_TOKENS)
    spent_s = replica.metrics.registry.get_sample_value(
        "mizzen:engine_step_seconds_sum", {"model_name": "chat", "engine": "0"}
    )
    alone_s = OUTPUT_TOKENS * (STEP_S + SEQUENCE_S) + PROMPT_TOKENS * PROMPT_TOKEN_S
    assert spent_s == pytest.approx(alone_s)
    assert replica.now == 1000.0  # the rest it was idle


def test_requests_are_held_until_a_pod_is_in_service_and_then_go_to_the_freest() -> None:
    fleet = Fleet("bench", "chat")
    fleet.ask()
    fleet.ask()
    assert fleet.held == 2
    fleet.set_pods({"chat-0", "chat-1"})
    fleet.work()
    assert fleet.held == 0
    assert [len(r.running) + len(r.waiting) for r in fleet.replicas.values()] == [1, 1]
    fleet.set_pods({"chat-1"})
    assert set(fleet.replicas) == {"chat-1"}


async def test_prometheus_finds_every_replica_and_the_gateway_and_nothing_in_an_outage() -> None:
    fleet = Fleet("bench", "chat")
    fleet.set_pods({"chat-0"})
    runner = web.ServerRunner(web.Server(fleet.answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with ClientSession(f"http://{address}") as session:

            async def get(path: str) -> tuple[int, str]:
                async with session.get(path) as answer:
                    return answer.status, await answer.text()

            (target,) = json.loads((await get("/targets"))[1])
            assert target["targets"] == [address]
            labels = target["labels"]
            assert (labels["namespace"], labels["mizzen_dev_deployment"]) == ("bench", "chat")
            for path in (labels["__metrics_path__"], "/gateway"):
                status, text = await get(path)
                assert status == 200 and list(text_string_to_metric_families(text))
            assert (await get("/chat-7"))[0] == 404
            fleet.is_observable = False
            assert (await get("/gateway"))[0] == 503
    finally:
        await runner.cleanup()
    jobs = scrape_configuration(address, every_s=5)["scrape_configs"]
    assert isinstance(jobs, list)
    assert [job["job_name"] for job in jobs] == ["gateway", "runtimes"]


def test_a_line_is_told_when_size_or_reason_change_and_not_for_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    episode = Episode(Fleet("bench", "chat"))
    scaling = {"desired": 2, "state": "FollowsLoad", "reason": "LoadRose", "inputs": {"held": "1"}}
    status = {"ready": "1/2", "scaling": scaling}
    for one in ({}, status, status | {"scaling": scaling | {"inputs": {}}}):
        episode.see_resource("MODIFIED", {"status": one})
    assert capsys.readouterr().out.split(None, 2)[2] == (
        "1/2 ready, 2 wanted  FollowsLoad  LoadRose\n"
    )
    assert account({}) == ()
    assert not episode.is_at_zero


def test_pods_take_requests_while_they_are_ready_and_stay() -> None:
    pod: Json = {"metadata": {}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    assert is_in_service(pod)
    assert not is_in_service(pod | {"metadata": {"deletionTimestamp": "2026-09-01T10:00:00Z"}})
    assert not is_in_service({"metadata": {}})
