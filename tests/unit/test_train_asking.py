"""Questions to another model: few connections, and no more of them once one has failed."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import urllib3

from mizzen.runtime.train.asking import Asker
from mizzen.runtime.train.options import ServedModel
from mizzen.runtime.train.stop import StopFlag


class Answers(BaseHTTPRequestHandler):
    """Says the question's number, when it has what the question waits for."""

    protocol_version = "HTTP/1.1"  # connections stay
    asked: list[int]
    connections: set[int]
    ready: threading.Event
    four: threading.Barrier

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(question["number"])
        self.connections.add(self.client_address[1])
        if question.get("waits_for") == "ready":
            self.ready.wait(60)
        if question.get("waits_for") == "three others":
            self.four.wait(60)
        said = str(question["number"]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[type[Answers], Asker]]:
    own: type[Answers] = type("Own", (Answers,), {})
    own.asked, own.connections = [], set()
    own.ready, own.four = threading.Event(), threading.Barrier(4)
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    where = ServedModel(url=f"http://127.0.0.1:{server.server_port}/", model="big")
    yield own, Asker(where, "/v1/x", api_key=None, retries=0, answer_s=60.0)
    server.shutdown()
    thread.join()
    server.server_close()


def number(answer: urllib3.BaseHTTPResponse) -> int:
    return int(answer.data)


def test_answers_come_in_the_order_of_their_questions_over_connections_that_are_kept(
    server: tuple[type[Answers], Asker],
) -> None:
    own, asker = server
    questions = [{"number": n, "waits_for": "three others"} for n in range(20)]

    def read_four_at_once(answer: urllib3.BaseHTTPResponse) -> int:
        own.four.wait(60)  # each with a connection that it has given back
        return number(answer)

    assert asker.ask_all(questions, read_four_at_once, StopFlag()) == [*range(20)]
    assert sorted(own.asked) == [*range(20)]
    assert len(own.connections) == 4


def test_questions_that_wait_their_turn_are_taken_back_when_one_fails(
    server: tuple[type[Answers], Asker],
) -> None:
    own, asker = server
    questions = [{"number": n, "waits_for": "ready" if n else None} for n in range(20)]

    def refuse_the_first(answer: urllib3.BaseHTTPResponse) -> int:
        if number(answer) == 0:
            raise ValueError("the first")
        return number(answer)

    with pytest.raises(ValueError, match="the first"):
        asker.ask_all(questions, refuse_the_first, StopFlag())
    own.ready.set()
    # First come, first served: had the others not been taken back, they would come before this.
    assert asker.ask_all([{"number": 20}], number, StopFlag()) == [20]
    assert len(own.asked) <= 6
