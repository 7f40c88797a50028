"""Requests that schemathesis makes from a port's own description, right ones and wrong ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import HypothesisException
from requests import RequestException
from schemathesis import GenerationMode

from hack.fuzz.requests import MODEL
from hack.fuzz.send import TIMEOUT_S
from hack.fuzz.tally import Tally

_FIXED = {"model": MODEL, "version": "1"}


def rounds(
    url: str, tally: Tally, *, part: str, seed: int, examples: int, goes_on: Callable[[], bool]
) -> Iterator[str]:
    """Send `examples` to each operation, right ones, then wrong ones, and yield after each.

    Stops between two requests once `goes_on` says no.
    """
    schema = schemathesis.openapi.from_url(url + "/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:
            send = _sender(operation, mode, url, tally, part, goes_on)
            run = settings(
                max_examples=examples,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(seeded(seed)(send))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    run()
                except HypothesisException:
                    tally.count(part, f"nothing {mode} to make")
            yield operation.label


def _sender(
    operation: Any,
    mode: GenerationMode,
    url: str,
    tally: Tally,
    part: str,
    goes_on: Callable[[], bool],
) -> Callable[[], None]:
    strategy = operation.as_strategy(generation_mode=mode)

    @given(case=strategy)
    def send(case: Any) -> None:
        if not goes_on():
            return
        # A name that nothing is served under would end every request at its first line.
        for name in _FIXED.keys() & (case.path_parameters or {}).keys():
            case.path_parameters[name] = _FIXED[name]
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODEL
        try:
            answer = case.call(base_url=url, timeout=TIMEOUT_S)
        except RequestException as error:
            tally.find(part, f"{operation.label}: {error!r}", repr(case.body).encode())
            return
        tally.http(part, operation.label, answer, repr(case.body).encode())

    return send
