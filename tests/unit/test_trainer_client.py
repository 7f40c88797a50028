"""What the operator makes of replicas that answer about loans, well and badly."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from mizzen.operator.status.loans import Lender
from mizzen.operator.trainers import LoanRefusedError, TrainerClient

LOAN = {
    "job": "team/support", "generation": 3, "directory": "/mnt/pvc/models/jobs/x",
    "exitCode": None, "endedAt": "", "reason": "", "message": "", "progress": {"phase": "Running"},
}  # fmt: skip


class Replica:
    """Answers every call with the same, and keeps who asked."""

    def __init__(self) -> None:
        self.answer: Any = {"inFlight": 2, "loan": LOAN}
        self.status = 200
        self.asked: list[tuple[str, str]] = []  # method, authorization

    async def handle(self, request: web.Request) -> web.Response:
        assert request.path == "/loan"
        self.asked.append((request.method, request.headers.get("Authorization", "")))
        if isinstance(self.answer, str):
            return web.Response(text=self.answer, status=self.status)
        return web.json_response(self.answer, status=self.status)


@pytest.fixture
def replica() -> Replica:
    return Replica()


@pytest.fixture
async def client(replica: Replica, tmp_path: Path) -> AsyncIterator[TrainerClient]:
    (tmp_path / "token").write_text("secret\n")
    app = web.Application()
    app.router.add_route("*", "/loan", replica.handle)
    async with TestServer(app) as server:
        assert server.port is not None
        made = TrainerClient(tmp_path / "token", admin_port=server.port)
        yield made
        await made.close()


async def test_a_replica_says_whose_job_it_has(client: TrainerClient, replica: Replica) -> None:
    found = await client.lender("127.0.0.1")
    assert found is not None
    assert found.loan is not None
    assert (found.in_flight, found.loan.generation, found.is_free) == (2, 3, False)
    assert replica.asked == [("GET", "Bearer secret")]
    replica.answer = {"inFlight": 0, "loan": None}
    assert await client.lender("127.0.0.1") == Lender(None, 0)


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (404, {"error": "an image that does not know loans"}),
        (503, {"error": "it loads"}),
        (200, "no JSON"),
        (200, {"loan": None}),
        (200, {"inFlight": 0, "loan": {"job": "team/support"}}),
        (200, {"inFlight": 0, "loan": LOAN | {"exitCode": "soon"}}),
        (200, {"inFlight": 0, "loan": LOAN | {"progress": None}}),
        (200, {"inFlight": 0, "loan": LOAN | {"progress": {"step": 3}}}),
    ],
)
async def test_what_is_no_answer_about_loans_counts_as_silence(
    client: TrainerClient, replica: Replica, status: int, answer: Any
) -> None:
    replica.status, replica.answer = status, answer
    assert await client.lender("127.0.0.1") is None


async def test_a_refused_job_is_told_from_one_that_has_to_wait(
    client: TrainerClient, replica: Replica
) -> None:
    assert await client.lend("127.0.0.1", {"job": "team/support"})
    for status in (401, 404, 429, 503):
        replica.status = status
        assert not await client.lend("127.0.0.1", {})
        assert not await client.take_back("127.0.0.1")
    replica.status, replica.answer = 400, {"error": "Set workers to 1."}
    with pytest.raises(LoanRefusedError, match=r"^Set workers to 1\.$"):
        await client.lend("127.0.0.1", {})


async def test_a_replica_that_is_gone_is_no_error(tmp_path: Path) -> None:
    nobody = TrainerClient(tmp_path / "token", admin_port=1, timeout_s=0.5)
    assert await nobody.lender("127.0.0.1") is None
    assert not await nobody.lend("127.0.0.1", {})
    assert not await nobody.take_back("127.0.0.1")
    await nobody.close()


def test_an_address_of_ipv6_is_written_as_urls_have_it(tmp_path: Path) -> None:
    assert TrainerClient(tmp_path)._url("fd00::7", "/loan") == "http://[fd00::7]:8002/loan"
