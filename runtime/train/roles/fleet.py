"""Replicas that answer for a trainer: who is there, who knows the policy, who takes the next part.

Must not know how a policy is made, nor what its answers are for.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import urllib3

from mizzen.runtime.train.asking import BUSY, error_of, has_no_numbers
from mizzen.runtime.train.errors import RolloutRefusedError, RolloutUnavailableError
from mizzen.runtime.train.methods.method import StepNotFiniteError
from mizzen.runtime.train.stop import Stop

log = logging.getLogger(__name__)

_AT_ONCE = 16  # answers that one replica is asked for in one go
_ANSWER_S = 300.0
_PATIENCE_S = 1800.0
_PAUSE_S = 2.0
_POLL_S = 0.2
_MOST_REPLICAS = 64  # that are asked at the same time
_UNKNOWN = 404
_GOODBYE_S = 5.0  # a trainer that leaves does not wait for long; replicas forget by themselves


@dataclass(frozen=True, slots=True)
class Policy:
    """One version: `name` says its content."""

    name: str
    body: bytes


@dataclass(slots=True)
class _Round:
    """The answers to one batch of questions, as they come in from several threads."""

    policy: Policy
    questions: Sequence[Mapping[str, Any]]
    rules: Mapping[str, Any]
    parts: deque[range]
    answers: dict[int, Any] = field(default_factory=dict)
    is_over: threading.Event = field(default_factory=threading.Event)


class _AwayError(Exception):
    """A replica does not answer for now; the text says why."""


class Fleet:
    """The replicas behind one name. They may come and go at any time."""

    def __init__(
        self, url: str, *, token: str | None, stop: Stop, patience_s: float = _PATIENCE_S
    ) -> None:
        self._url = url
        self._stop = stop
        self._patience_s = patience_s
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = urllib3.PoolManager(
            num_pools=_MOST_REPLICAS,
            timeout=urllib3.Timeout(connect=10.0, read=_ANSWER_S),
            retries=False,  # another replica is asked instead
        )
        self._threads = ThreadPoolExecutor(_MOST_REPLICAS, thread_name_prefix="rollouts")

    def draw(
        self,
        policy: Policy,
        questions: Sequence[Mapping[str, Any]],
        rules: Mapping[str, Any],
    ) -> list[Any]:
        """Return the policy's answer to each question, of whichever replica.

        Raises:
            YieldRequested: somebody asked to stop; no answer is waited for.
            StepNotFiniteError: the policy gives a replica no finite numbers.
            RolloutRefusedError: a replica refuses the policy or the questions.
            RolloutUnavailableError: none answered for as long as there is patience.
        """
        starts = range(0, len(questions), _AT_ONCE)
        parts = deque(range(at, min(at + _AT_ONCE, len(questions))) for at in starts)
        asked = _Round(policy, questions, rules, parts)
        try:
            self._until_answered(asked)
        finally:
            asked.is_over.set()
        return [asked.answers[place] for place in range(len(questions))]

    def close(self, job: str) -> None:
        """Have every replica that is there forget the job's policy."""
        # Not the threads that draw: after a yield they may wait for answers that nobody reads.
        with ThreadPoolExecutor(_MOST_REPLICAS, thread_name_prefix="goodbyes") as threads:
            for base in _addresses(self._url)[:_MOST_REPLICAS]:
                threads.submit(self._say_goodbye, base, job)

    def _say_goodbye(self, base: str, job: str) -> None:
        try:
            self._http.request(
                "DELETE",
                f"{base}/rollouts/policy",
                fields={"job": job},
                headers=self._headers,
                timeout=_GOODBYE_S,
            )
        except urllib3.exceptions.HTTPError as error:
            log.info("The replica at %s was not told of the job's end: %s", base, error)

    def _until_answered(self, asked: _Round) -> None:
        ends_at_s = time.monotonic() + self._patience_s
        while len(asked.answers) < len(asked.questions):
            answered = len(asked.answers)
            trouble = self._ask_all(asked)
            if len(asked.answers) > answered:
                ends_at_s = time.monotonic() + self._patience_s
            elif time.monotonic() > ends_at_s:
                raise RolloutUnavailableError(self._url, trouble)
            else:
                self._pause()

    def _ask_all(self, asked: _Round) -> str:
        """Have each replica that is there take parts until none is left; return what went wrong."""
        bases = _addresses(self._url)[:_MOST_REPLICAS]
        futures = [self._threads.submit(self._serve, base, asked) for base in bases]
        troubles = [t for future in futures if (t := _wait_for(future, self._stop))]
        # Each once: of many replicas most have the same.
        return ", ".join(dict.fromkeys(troubles)) or "its name resolves to no address"

    def _serve(self, base: str, asked: _Round) -> str | None:
        """Have one replica answer parts until none is left or it is away; return why it is."""
        while not asked.is_over.is_set():
            try:
                part = asked.parts.popleft()
            except IndexError:
                return None
            try:
                answers = self._answers(base, asked, part)
            except _AwayError as away:
                asked.parts.append(part)
                log.info("The replica at %s draws no answers for now: %s", base, away)
                return str(away)
            asked.answers.update(zip(part, answers, strict=True))
        return None

    def _answers(self, base: str, asked: _Round, part: range) -> list[Any]:
        question = {
            "policy": asked.policy.name,
            "prompts": [asked.questions[place]["prompt"] for place in part],
            "seeds": [asked.questions[place]["seed"] for place in part],
            **asked.rules,
        }
        body = json.dumps(question).encode()
        answer = self._post(f"{base}/rollouts", body)
        if answer.status == _UNKNOWN:
            _checked(self._post(f"{base}/rollouts/policy", asked.policy.body))
            answer = self._post(f"{base}/rollouts", body)
            if answer.status == _UNKNOWN:  # restarted in between
                raise _AwayError("it lost the policy")
        return _read_answers(_checked(answer), asked.policy.name, len(part))

    def _post(self, url: str, body: bytes) -> urllib3.BaseHTTPResponse:
        try:
            return self._http.request("POST", url, body=body, headers=self._headers)
        except urllib3.exceptions.HTTPError as error:
            raise _AwayError(f"{type(error).__name__}") from error

    def _pause(self) -> None:
        ends_at_s = time.monotonic() + _PAUSE_S
        while time.monotonic() < ends_at_s:
            self._stop.check()
            time.sleep(_POLL_S)


def _checked(answer: urllib3.BaseHTTPResponse) -> urllib3.BaseHTTPResponse:
    """Return an answer that is one.

    Raises:
        StepNotFiniteError: this policy does not answer with numbers, whichever replica is asked.
        RolloutRefusedError: it would be the same for any replica, at any time.
    """
    if answer.status == 200:
        return answer
    if has_no_numbers(answer):
        raise StepNotFiniteError("a replica of rl.rollout has no finite numbers for this policy")
    if answer.status in BUSY:
        raise _AwayError(f"it answered {answer.status}")
    words = f"it answered {answer.status} and is no replica of this version."
    raise RolloutRefusedError(error_of(answer, "message") or words)


def _read_answers(answer: urllib3.BaseHTTPResponse, policy: str, count: int) -> list[Any]:
    """Return a replica's answers.

    Raises:
        RolloutRefusedError: they are none, or of another policy.
    """
    try:
        document = answer.json()
        answers = list(document["answers"])
        if document["policy"] == policy and len(answers) == count:
            return answers
    except (ValueError, LookupError, TypeError):
        pass
    raise RolloutRefusedError("it is no replica of this version: its answers make no sense.")


def _addresses(url: str) -> list[str]:
    """Return the URL of each replica that the name stands for now, none where it is unknown."""
    parts = urlsplit(url)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return []
    places = {(str(address[0]), int(address[1])) for *_, address in found}
    return [
        f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        for host, port in sorted(places)
    ]


def _wait_for(future: Future[str | None], stop: Stop) -> str | None:
    stop.check()
    while not future.done():
        wait([future], timeout=_POLL_S)
        stop.check()
    return future.result()
