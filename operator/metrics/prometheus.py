"""Figures from a Prometheus server: one query per figure, for all deployments at once."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence

import aiohttp

from mizzen.operator.metrics.figures import (
    ALL,
    KNOWN,
    RUNNING,
    Figure,
    Kind,
    Measured,
    Name,
    Origin,
    Raw,
    Target,
    measured,
)

logger = logging.getLogger(__name__)

_SLOW_WINDOW_S = 300
_FEWEST_FAST_WINDOW_S = 30
# A rate needs two samples; four intervals hold them even when one scrape is missed.
_INTERVALS = 4
# Labels that name the deployment: the gateway writes them itself (its scrape must keep them:
# honor_labels), a runtime pod's come from its own labels through the scrape configuration.
_NAME_LABELS = {
    Origin.GATEWAY: ("namespace", "model"),
    Origin.RUNTIME: ("namespace", "mizzen_dev_deployment"),
}
Row = tuple[dict[str, str], float]


def expression(figure: Figure, *, scrape_s: float) -> str:
    """Return the PromQL of one figure, by deployment."""
    labels = ", ".join((*_NAME_LABELS[figure.origin], *figure.by))
    fast = int(max(_FEWEST_FAST_WINDOW_S, _INTERVALS * scrape_s))
    match figure.kind:
        case Kind.SUM:
            return f"sum by ({labels}) ({figure.metric})"
        case Kind.MEAN:
            return f"avg by ({labels}) ({figure.metric})"
        case Kind.RATE:
            return f"sum by ({labels}) (rate({figure.metric}[{fast}s]))"
        case Kind.SLOW_RATE:
            return f"sum by ({labels}) (rate({figure.metric}[{_SLOW_WINDOW_S}s]))"


def age_expression(figure: Figure) -> str:
    """Return the PromQL of the age of the oldest series, by deployment; in seconds."""
    labels = ", ".join(_NAME_LABELS[figure.origin])
    return f"time() - min by ({labels}) (timestamp({figure.metric}))"


def count_expression(figure: Figure) -> str:
    """Return the PromQL of the number of series, by deployment."""
    return f"count by ({', '.join(_NAME_LABELS[figure.origin])}) ({figure.metric})"


class PrometheusSource:
    """Asks one Prometheus server; what it does not answer is unknown."""

    def __init__(self, url: str, *, scrape_s: float, timeout_s: float = 4.0) -> None:
        self._url = url.rstrip("/")
        self._scrape_s = scrape_s
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._is_failing = False

    async def collect(self, targets: Sequence[Target]) -> Mapping[Name, Measured]:
        """Return the signals of each target."""
        questions = [expression(figure, scrape_s=self._scrape_s) for figure in ALL]
        questions += [age_expression(KNOWN), age_expression(RUNNING), count_expression(RUNNING)]
        answers = await asyncio.gather(*map(self._ask, questions))
        # Without an answer nobody knows whether a replica was scraped.
        reporting = None if answers[-1] is None else 0
        found = {target.name: Raw(reporting=reporting) for target in targets}
        for figure, rows in zip(ALL, answers, strict=False):
            for labels, value in rows or ():
                if raw := found.get(_name(figure.origin, labels)):
                    parts = tuple(labels.get(label, "") for label in figure.by)
                    raw.values[figure, parts] = value
        gateway_ages, runtime_ages, counts = (rows or [] for rows in answers[len(ALL) :])
        if _is_unanswered(Origin.GATEWAY, answers):
            gateway_ages = []  # what a gateway does not show reads as zero, so this must not
        for labels, value in gateway_ages:
            if raw := found.get(_name(Origin.GATEWAY, labels)):
                raw.gateway_age_s = value
        for labels, value in runtime_ages:
            if raw := found.get(_name(Origin.RUNTIME, labels)):
                raw.runtime_age_s = value
        for labels, value in counts:
            if raw := found.get(_name(Origin.RUNTIME, labels)):
                raw.reporting = int(value)
        return {target.name: measured(found[target.name], target) for target in targets}

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _ask(self, question: str) -> list[Row] | None:
        """Return the answer's rows, None where there is no answer."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        try:
            async with self._session.post(
                f"{self._url}/api/v1/query", data={"query": question}
            ) as response:
                document = await response.json()
            found = [
                (dict(row["metric"]), float(row["value"][1])) for row in document["data"]["result"]
            ]
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            if not self._is_failing:
                logger.warning("Prometheus does not answer", extra={"error": repr(error)})
            self._is_failing = True
            return None
        self._is_failing = False
        # A division of nothing by nothing is no figure.
        return [(labels, value) for labels, value in found if math.isfinite(value)]


def _is_unanswered(origin: Origin, answers: Sequence[list[Row] | None]) -> bool:
    """Whether Prometheus failed to answer for any of the origin's figures."""
    asked = zip(ALL, answers, strict=False)
    return any(figure.origin is origin and rows is None for figure, rows in asked)


def _name(origin: Origin, labels: Mapping[str, str]) -> Name:
    namespace, name = _NAME_LABELS[origin]
    return labels.get(namespace, ""), labels.get(name, "")
