"""A judge behind an OpenAI-compatible address: a deployment, as a rule, through the gateway."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import urllib3

from mizzen.runtime.train.asking import BUSY, Asker, has_no_numbers
from mizzen.runtime.train.errors import JudgeFailedError, JudgeUnreachableError
from mizzen.runtime.train.options import ServedModel
from mizzen.runtime.train.records import Messages
from mizzen.runtime.train.stop import Stop
from mizzen.runtime.train.suites.answers import Judge, Preference
from mizzen.runtime.train.together import Together

# A deployment that sleeps is woken by the request, which the gateway holds that long.
_ANSWER_S = 300.0
_RETRIES = 6
_SCHEMA = {
    "type": "object",
    "properties": {"better": {"enum": ["A", "B", "tie"]}},
    "required": ["better"],
    "additionalProperties": False,
}
_MEANING: dict[object, Preference] = {"A": "first", "B": "second", "tie": "tie"}


class HttpJudge:
    """Asks for a choice between A, B and tie, which the request's JSON schema holds it to."""

    def __init__(self, where: ServedModel, *, api_key: str | None, retries: int = _RETRIES) -> None:
        self._model = where.model
        self._asker = Asker(
            where, "/v1/chat/completions", api_key=api_key, retries=retries, answer_s=_ANSWER_S
        )

    def compare(
        self, messages: Messages, pairs: Sequence[tuple[str, str]], stop: Stop
    ) -> list[Preference]:
        """Return the better one of each pair of answers to the same conversation.

        Raises:
            YieldRequested: somebody asked to stop; the judge's word is not waited for.
            JudgeFailedError: it refuses, or says something else.
            JudgeUnreachableError: it did not answer in several attempts.
        """
        questions = [_question(messages, *pair) for pair in pairs]
        try:
            return self._asker.ask_all(questions, self._read, stop)
        except urllib3.exceptions.HTTPError as error:
            raise JudgeUnreachableError(f"{self._asker.url} cannot be reached") from error

    def _read(self, answer: urllib3.BaseHTTPResponse) -> Preference:
        said = answer.data.decode(errors="replace")[:300]
        if answer.status in BUSY and not has_no_numbers(answer):
            raise JudgeUnreachableError(f"{self._asker.url} answers {answer.status}")
        if answer.status != 200:
            raise JudgeFailedError(self._model, f"answers {answer.status}: {said}.")
        try:
            text = answer.json()["choices"][0]["message"]["content"]
            return _MEANING[json.loads(text)["better"]]
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeFailedError(self._model, f"says neither A, B nor tie: {said}.") from error


class SharedJudge:
    """A judge that the first of a model's ranks asks for all of them: its word is theirs."""

    def __init__(self, own: Judge, ranks: Together) -> None:
        self._own = own
        self._ranks = ranks

    def compare(
        self, messages: Messages, pairs: Sequence[tuple[str, str]], stop: Stop
    ) -> list[Preference]:
        """Return what the judge tells the first rank; raises there what asking raises.

        Raises:
            YieldRequested: any rank was asked to stop; the judge's word is not waited for.
            RankLostError: the first rank is gone, perhaps since the judge does not answer.
        """

        def ask(shown: Stop) -> bytes:
            return json.dumps(self._own.compare(messages, pairs, shown)).encode()

        return list(json.loads(self._ranks.from_leader(ask, stop)))


def _question(messages: Messages, first: str, second: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": build_question(messages, first, second)}],
        "temperature": 0,
        "max_tokens": 32,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "verdict", "schema": _SCHEMA, "strict": True},
        },
    }


def build_question(messages: Messages, first: str, second: str) -> str:
    """Return what the judge is asked."""
    conversation = "\n".join(f"{one['role']}: {one['content']}" for one in messages)
    return (
        "Two assistants answered the same conversation. Judge which answer is more helpful, "
        "correct and to the point. Do not favour length or the order they are shown in.\n\n"
        f"[Conversation]\n{conversation}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}\n\n"
        'Reply with JSON: {"better": "A"}, {"better": "B"} or {"better": "tie"}.'
    )
