"""Questions over HTTP to another model: a few at once, and again while it is busy or away.

Must not know what is asked, nor what an answer means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Self, TypeVar

import urllib3

from mizzen.runtime.train.options import ServedModel
from mizzen.runtime.train.stop import Stop

T = TypeVar("T")

BUSY = frozenset({429, 500, 502, 503, 504})  # statuses that may be others a little later
_NOT_FINITE = "generation_failed"  # the code beside status 500

_AT_ONCE = 4  # a replica computes one after the other; more would only wait there
_LONGEST_PAUSE_S = 30.0
_POLL_S = 0.2


def has_no_numbers(answer: urllib3.BaseHTTPResponse) -> bool:
    """Return whether the model's numbers overflowed, as they will however often it is asked."""
    return error_of(answer, "code") == _NOT_FINITE


def error_of(answer: urllib3.BaseHTTPResponse, name: str) -> str | None:
    """Return a field of an error in OpenAI's shape, None where the answer is something else."""
    try:
        return str(answer.json()["error"][name])
    except (ValueError, LookupError, TypeError):
        return None


class _Patience(urllib3.Retry):
    """Asks again, but not for an answer that would be the same."""

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: urllib3.BaseHTTPResponse | None = None,
        *args: Any,
        **more: Any,
    ) -> Self:
        """Return what is left; nothing is where the model has no numbers."""
        is_final = response is not None and has_no_numbers(response)
        left = self.new(total=0) if is_final else self
        return super(_Patience, left).increment(method, url, response, *args, **more)


class Asker:
    """Asks one model at one path of its address."""

    def __init__(
        self, where: ServedModel, path: str, *, api_key: str | None, retries: int, answer_s: float
    ) -> None:
        self.url = f"{where.url.rstrip('/')}{path}"
        self._model = where.model
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._http = urllib3.PoolManager(
            maxsize=_AT_ONCE,
            timeout=urllib3.Timeout(connect=10.0, read=answer_s),
            retries=_Patience(
                total=retries,
                backoff_factor=0.5,
                backoff_max=_LONGEST_PAUSE_S,
                status_forcelist=BUSY,
                allowed_methods=None,  # a question changes nothing, so asking twice is harmless
                raise_on_status=False,
            ),
        )
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="asker")

    def ask_all(
        self,
        questions: Sequence[Mapping[str, Any]],
        read: Callable[[urllib3.BaseHTTPResponse], T],
        stop: Stop,
    ) -> list[T]:
        """Return what `read` makes of the answer to each question; what it raises ends them all.

        It is given the last attempt's answer, whose status may be one of `BUSY`.

        Raises:
            YieldRequested: somebody asked to stop; no answer is waited for.
            urllib3.exceptions.HTTPError: there was no answer, in no attempt.
        """
        futures = [self._threads.submit(self._ask, question, read) for question in questions]
        try:
            return [_wait_for(future, stop) for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _ask(self, question: Mapping[str, Any], read: Callable[[urllib3.BaseHTTPResponse], T]) -> T:
        body = json.dumps({"model": self._model, **question})
        return read(self._http.request("POST", self.url, body=body, headers=self._headers))


def _wait_for(future: Future[T], stop: Stop) -> T:
    stop.check()
    while not future.done():
        wait([future], timeout=_POLL_S)
        stop.check()
    return future.result()
