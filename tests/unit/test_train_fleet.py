"""Replicas that draw for a trainer, played: those that are away, busy, of other versions."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from mizzen.runtime.train.errors import RolloutRefusedError, RolloutUnavailableError
from mizzen.runtime.train.methods.method import StepNotFiniteError
from mizzen.runtime.train.roles.fleet import Fleet, Policy
from mizzen.runtime.train.stop import StopFlag, YieldRequested

RULES = {"max_tokens": 6, "temperature": 0.7}
ASKED = [{"prompt": list(range(20 + at, 32 + at)), "seed": at} for at in range(20)]


def fleet_of(url: str, **options: Any) -> Fleet:
    return Fleet(url, **{"token": "secret", "stop": StopFlag(), **options})


class Replica(BaseHTTPRequestHandler):
    """Says a status to everybody; where it is 200, an answer to each prompt."""

    status, policy, code = 200, "policy:1", ""
    goodbyes: ClassVar[list[tuple[str, str]]]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers = [{"token_ids": prompt, "log_probs": []} for prompt in asked["prompts"]]
        said: dict[str, Any] = {"policy": self.policy, "answers": answers}
        if self.code:
            said = {"error": {"code": self.code, "message": "It failed."}}
        body = json.dumps(said).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_DELETE(self) -> None:
        type(self).goodbyes.append((self.path, self.headers["Authorization"]))
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Replica]]:
    """A replica at one of the two addresses that the name stands for; nobody is at the other."""
    kind = type("Own", (Replica,), {"goodbyes": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        places = [("", 0, 0, "", at) for at in (nobody.getsockname(), server.server_address)]
        monkeypatch.setattr(socket, "getaddrinfo", real_or(places))
        yield kind
    server.shutdown()
    thread.join()
    server.server_close()


def real_or(places: list[Any]) -> Any:
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        return places if host == "chat" else real(host, *args, **options)

    return getaddrinfo


def test_who_is_there_draws_what_a_dead_replica_should_have(fake: type[Replica]) -> None:
    answers = fleet_of("http://chat:8000").draw(Policy("policy:1", b""), ASKED, RULES)
    assert [answer["token_ids"] for answer in answers] == [q["prompt"] for q in ASKED]


def test_an_answer_of_another_policy_is_not_taken(fake: type[Replica]) -> None:
    fake.policy = "policy:0"
    with pytest.raises(RolloutRefusedError, match="make no sense"):
        fleet_of("http://chat:8000").draw(Policy("policy:1", b""), ASKED, RULES)


def test_busy_replicas_are_not_waited_for_for_ever(fake: type[Replica]) -> None:
    fake.status = 503
    fleet = fleet_of("http://chat:8000", patience_s=0.0)
    with pytest.raises(RolloutUnavailableError, match=r"No replica at http://chat:8000"):
        fleet.draw(Policy("policy:1", b""), ASKED, RULES)


def test_a_policy_without_finite_numbers_is_not_asked_for_again(fake: type[Replica]) -> None:
    fake.status, fake.code = 500, "generation_failed"
    with pytest.raises(StepNotFiniteError, match="no finite numbers for this policy"):
        fleet_of("http://chat:8000").draw(Policy("policy:1", b""), ASKED, RULES)


def test_another_failure_of_a_replica_is_one_that_may_pass(fake: type[Replica]) -> None:
    fake.status, fake.code = 500, "internal_error"
    fleet = fleet_of("http://chat:8000", patience_s=0.0)
    with pytest.raises(RolloutUnavailableError, match="it answered 500"):
        fleet.draw(Policy("policy:1", b""), ASKED, RULES)


def test_a_name_that_stands_for_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    fleet = fleet_of("http://chat:8000", patience_s=0.0)
    with pytest.raises(RolloutUnavailableError, match="resolves to no address"):
        fleet.draw(Policy("policy:1", b""), ASKED, RULES)


def test_a_server_that_knows_no_rollouts_is_refused(fake: type[Replica]) -> None:
    fake.status = 405
    with pytest.raises(RolloutRefusedError, match="405 and is no replica of this version"):
        fleet_of("http://chat:8000").draw(Policy("policy:1", b""), ASKED, RULES)


def test_nobody_waits_for_replicas_when_asked_to_stop(fake: type[Replica]) -> None:
    fake.status = 503
    stop = StopFlag()
    timer = threading.Timer(0.5, stop.ask)
    timer.start()
    with pytest.raises(YieldRequested):
        fleet_of("http://chat:8000", stop=stop).draw(Policy("policy:1", b""), ASKED, RULES)
    timer.join()


@pytest.mark.parametrize("status", [200, 404, 503], ids=str)
def test_a_job_that_ends_tells_every_replica_and_none_can_keep_it(
    fake: type[Replica], status: int
) -> None:
    fake.status = status
    fleet_of("http://chat:8000").close("team/tune")
    assert fake.goodbyes == [("/rollouts/policy?job=team%2Ftune", "Bearer secret")]
