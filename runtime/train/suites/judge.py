"""A judge behind an OpenAI-compatible address: a deployment, as a rule, through the gateway."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import urllib3
from urllib3.util import Retry, Timeout

from mizzen.runtime.train.config import Judge as JudgeConfig
from mizzen.runtime.train.errors import JudgeFailedError, JudgeUnreachableError
from mizzen.runtime.train.records import Messages
from mizzen.runtime.train.stop import Stop
from mizzen.runtime.train.suites.answers import Preference

T = TypeVar("T")

_ASKED_AT_ONCE = 4
_LOOK_FOR_STOP_S = 0.2
# A deployment that sleeps is woken by the request, which the gateway holds that long.
_ANSWER_TIMEOUT_S = 300.0
_RETRIES = Retry(
    total=6,
    backoff_factor=0.5,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=None,  # asking a judge twice changes nothing
    raise_on_status=False,
)
_SCHEMA = {
    "type": "object",
    "properties": {"better": {"enum": ["A", "B", "tie"]}},
    "required": ["better"],
    "additionalProperties": False,
}
_MEANING: dict[object, Preference] = {"A": "first", "B": "second", "tie": "tie"}


class HttpJudge:
    """Asks for a choice between A, B and tie, which the request's JSON schema holds it to."""

    def __init__(self, config: JudgeConfig, *, api_key: str | None) -> None:
        self._url = f"{config.url.rstrip('/')}/v1/chat/completions"
        self._model = config.model
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._http = urllib3.PoolManager(
            retries=_RETRIES, timeout=Timeout(connect=10.0, read=_ANSWER_TIMEOUT_S)
        )
        self._threads = ThreadPoolExecutor(_ASKED_AT_ONCE, thread_name_prefix="judge")

    def compare(
        self, messages: Messages, pairs: Sequence[tuple[str, str]], stop: Stop
    ) -> list[Preference]:
        """Return the better one of each pair of answers to the same conversation.

        Raises:
            YieldRequested: somebody asked to stop; the judge's word is not waited for.
            JudgeFailedError: it refuses, or says something else.
            JudgeUnreachableError: it did not answer in several attempts.
        """
        asked = [self._threads.submit(self._ask, messages, *pair) for pair in pairs]
        return [_wait_for(one, stop) for one in asked]

    def _ask(self, messages: Messages, first: str, second: str) -> Preference:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": build_question(messages, first, second)}],
            "temperature": 0,
            "max_tokens": 32,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "schema": _SCHEMA, "strict": True},
            },
        }
        try:
            answer = self._http.request(
                "POST", self._url, body=json.dumps(body).encode(), headers=self._headers
            )
        except urllib3.exceptions.HTTPError as error:
            raise JudgeUnreachableError(f"{self._url} cannot be reached") from error
        if answer.status in _RETRIES.status_forcelist:
            raise JudgeUnreachableError(f"{self._url} answers {answer.status}")
        if answer.status != 200:
            text = answer.data.decode(errors="replace")[:300]
            raise JudgeFailedError(self._model, f"answers {answer.status}: {text}.")
        return self._read(answer.data)

    def _read(self, data: bytes) -> Preference:
        try:
            text = json.loads(data)["choices"][0]["message"]["content"]
            return _MEANING[json.loads(text)["better"]]
        except (ValueError, LookupError, TypeError) as error:
            said = data.decode(errors="replace")[:300]
            raise JudgeFailedError(self._model, f"says neither A, B nor tie: {said}.") from error


def build_question(messages: Messages, first: str, second: str) -> str:
    """Return what the judge is asked."""
    conversation = "\n".join(f"{one['role']}: {one['content']}" for one in messages)
    return (
        "Two assistants answered the same conversation. Judge which answer is more helpful, "
        "correct and to the point. Do not favour length or the order they are shown in.\n\n"
        f"[Conversation]\n{conversation}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}\n\n"
        'Reply with JSON: {"better": "A"}, {"better": "B"} or {"better": "tie"}.'
    )


def _wait_for(asked: Future[T], stop: Stop) -> T:
    while True:
        stop.check()
        try:
            return asked.result(timeout=_LOOK_FOR_STOP_S)
        except TimeoutError:
            continue
