"""One model over two pods: two `mizzen serve` processes, each with addresses of its own."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from hack.ports import free_port
from hack.tiny_model import write_tiny_model
from mizzen.runtime.errors import EXIT_RANK_LOST
from tests.fixtures.runtime_server import running_server, start_here

COMPLETIONS = "/v1/completions"
FLAGS = ("--device=cpu", "--dtype=float32", "--kv-cache-gib=0.02", "--max-model-len=4096")
TOKEN = "the group's own secret"
TENSOR, STAGES = "--tensor-parallel-size=2", "--pipeline-parallel-size=2"


class Pod:
    """One process of the group and clients of its ports."""

    def __init__(self, index: int, folder: Path) -> None:
        self.index = index
        self.host = f"127.0.0.{index + 2}"
        self.last_words = folder / f"termination-{index}"
        self.ports = {name: free_port() for name in ("port", "grpc-port", "admin-port")}
        self.http, self.admin = (
            httpx.AsyncClient(base_url=f"http://{self.host}:{self.ports[name]}", timeout=300)
            for name in ("port", "admin-port")
        )
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, *flags: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mizzen.cli", "serve", f"--host={self.host}"),
            *(f"--{name}={port}" for name, port in self.ports.items()),
            *(f"--node-rank={self.index}", *FLAGS, *flags),
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MIZZEN_TERMINATION_LOG": str(self.last_words),
            },
        )

    async def is_ready(self) -> bool:
        try:
            return (await self.admin.get("/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    async def wait_until_ready(self) -> None:
        while not await self.is_ready():
            assert self.process.returncode is None, "it ended instead of serving"
            await asyncio.sleep(0.1)

    def kill(self) -> None:
        """Kill all its processes, as the end of a container does."""
        process = psutil.Process(self.process.pid)
        for each in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    async def end(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 300)

    async def clean_up(self) -> None:
        if self.process and self.process.returncode is None:
            self.kill()
            await self.process.wait()
        await self.http.aclose()
        await self.admin.aclose()


class Group:
    """Two pods and what both are started with."""

    def __init__(self, folder: Path, spread: str) -> None:
        self.spread = spread
        self.model = write_tiny_model(folder / "tiny", context=4096)
        self.token_file = folder / "token"
        self.token_file.write_text(TOKEN)
        self.meeting_port = free_port()
        self.leader, self.follower = Pod(0, folder), Pod(1, folder)

    @property
    def flags(self) -> tuple[str, ...]:
        return (
            *(str(self.model), self.spread, "--nnodes=2"),
            *(f"--master-addr={self.leader.host}", f"--master-port={self.meeting_port}"),
            f"--admin-token-file={self.token_file}",
        )

    async def wait_until_ready(self) -> None:
        async with asyncio.timeout(400):
            await self.leader.wait_until_ready()
            await self.follower.wait_until_ready()


@asynccontextmanager
async def group_of(folder: Path, spread: str = TENSOR) -> AsyncIterator[Group]:
    group = Group(folder, spread)
    try:
        yield group
    finally:
        await group.leader.clean_up()
        await group.follower.clean_up()


@asynccontextmanager
async def serving_group(folder: Path, spread: str = TENSOR) -> AsyncIterator[Group]:
    async with group_of(folder, spread) as group:
        await group.leader.start(*group.flags)
        await group.follower.start(*group.flags)
        await group.wait_until_ready()
        yield group


def asked(**more: object) -> dict[str, object]:
    question = {"model": "tiny", "prompt": "one two three", "temperature": 0, "ignore_eos": True}
    return question | {"max_tokens": 12, "logprobs": 1} | more


async def answer_of(http: httpx.AsyncClient) -> list[str]:
    reply = await http.post(COMPLETIONS, json=asked())
    return reply.json()["choices"][0]["logprobs"]["tokens"]


async def answer_of_one_rank(model: Path) -> list[str]:
    fixed = {"model": str(model), "device": "cpu", "dtype": "float32", "kv_cache_gib": 0.02}
    async with running_server(start_here, max_model_len=4096, **fixed) as alone:
        return await answer_of(alone.http)


async def stream_to_its_end(
    http: httpx.AsyncClient, begun: asyncio.Event, max_tokens: int = 490
) -> list[str]:
    """Return the events of a long answer."""
    body = asked(stream=True, max_tokens=max_tokens)
    events = []
    async with http.stream("POST", COMPLETIONS, json=body) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                begun.set()
    return events


async def lose(group: Group, blow: signal.Signals) -> tuple[list[str], list[int]]:
    """Hit the follower under a running answer; return its events, and how new ones are answered."""
    begun = asyncio.Event()
    # So long that it cannot have ended when the blow falls.
    running = asyncio.create_task(stream_to_its_end(group.leader.http, begun, 4000))
    await begun.wait()
    group.follower.process.send_signal(blow)
    async with asyncio.timeout(300):
        while await group.leader.is_ready():  # noqa: ASYNC110 - as a kubelet probes
            await asyncio.sleep(0.05)
    statuses = []
    with contextlib.suppress(httpx.TransportError):  # until the port is closed
        while True:
            reply = await group.leader.http.post(COMPLETIONS, json=asked())
            statuses.append(reply.status_code)
            await asyncio.sleep(0.05)
    return await running, statuses


@pytest.mark.parametrize("spread", [TENSOR, STAGES], ids=["two ranks", "two stages"])
async def test_two_pods_answer_as_one_rank_and_the_death_of_one_ends_both(
    tmp_path: Path, spread: str
) -> None:
    async with serving_group(tmp_path, spread) as group:
        assert await answer_of(group.leader.http) == await answer_of_one_rank(group.model)
        events, statuses = await lose(group, signal.SIGKILL)
        assert json.loads(events[-1])["error"]["code"] == "engine_dead"
        assert set(statuses) <= {503}  # the port may be closed already
        assert await group.leader.end() == EXIT_RANK_LOST
        last_words = json.loads(group.leader.last_words.read_text())
        assert last_words["reason"] == "RankLost"
        # The pods' own line and the ranks' collective break at the same moment.
        assert last_words["message"] in {
            "Pod 1 closed its connection.",
            "Rank 0 lost another rank in a collective.",
        }


async def test_a_pod_that_is_stopped_is_missed_as_one_that_died(tmp_path: Path) -> None:
    async with serving_group(tmp_path) as group:
        events, statuses = await lose(group, signal.SIGSTOP)
        assert json.loads(events[-1])["error"]["code"] == "engine_dead"
        assert set(statuses) <= {503}  # the port may be closed already
        assert await group.leader.end() == EXIT_RANK_LOST
        group.follower.process.send_signal(signal.SIGCONT)
        assert await group.follower.end() == EXIT_RANK_LOST


async def test_a_follower_ends_when_its_leader_is_killed(tmp_path: Path) -> None:
    async with serving_group(tmp_path) as group:
        group.leader.kill()
        assert await group.follower.end() == EXIT_RANK_LOST
        last_words = json.loads(group.follower.last_words.read_text())
        assert last_words["reason"] == "RankLost"


async def test_a_group_that_is_asked_to_stop_ends_together_and_in_peace(tmp_path: Path) -> None:
    async with serving_group(tmp_path) as group:
        begun = asyncio.Event()
        running = asyncio.create_task(stream_to_its_end(group.leader.http, begun))
        await begun.wait()
        for pod in (group.follower, group.leader):  # in an order that needs the follower to wait
            pod.process.send_signal(signal.SIGTERM)
        assert (await running)[-1] == "[DONE]"
        assert await group.leader.end() == 0
        assert await group.follower.end() == 0


async def test_a_follower_whose_leader_never_comes_says_what_to_look_at(tmp_path: Path) -> None:
    async with group_of(tmp_path) as group:
        await group.follower.start(*group.flags, "--join-seconds=0.1")
        assert await group.follower.end() == EXIT_RANK_LOST
        message = json.loads(group.follower.last_words.read_text())["message"]
        assert f"did not reach its leader at {group.leader.host}:{group.meeting_port}" in message
        assert "network policies" in message
