"""Figures read from the gateways and runtimes themselves, for clusters without Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from mizzen.operator.metrics.figures import (
    ALL,
    Figure,
    Kind,
    Measured,
    Name,
    Origin,
    Raw,
    Target,
    measured,
)

METRICS_PORT = 8002
_SLOW_WINDOW_S = 300.0
_FAST_WINDOW_S = 30.0
_AT_ONCE = 64
# A series of one process: its metric, and those of its labels that matter.
Series = tuple[str, tuple[str, ...]]
Samples = Mapping[Series, float]

_LABELS: dict[str, tuple[str, ...]] = {
    figure.metric: (("namespace", "model") if figure.origin is Origin.GATEWAY else ()) + figure.by
    for figure in ALL
}
_PREFIXES = tuple(_LABELS)


def parse(text: str) -> dict[Series, float]:
    """Return the series we read from one process' metrics; label sets that fall together add up.

    Raises:
        ValueError: it is not Prometheus' text form.
    """
    # Only wanted lines go to the parser: it is the costly part, and most lines are buckets of
    # other histograms.
    lines = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(_PREFIXES))
    found: dict[Series, float] = {}
    for family in text_string_to_metric_families(lines):
        for sample in family.samples:
            if (labels := _LABELS.get(sample.name)) is not None:
                series = sample.name, tuple(sample.labels.get(label, "") for label in labels)
                found[series] = found.get(series, 0.0) + sample.value
    return found


@dataclass(slots=True)
class Process:
    """The last five minutes of one scraped process."""

    scrapes: deque[tuple[float, Samples]] = field(default_factory=deque)

    def take(self, now_s: float, samples: Samples) -> None:
        """Keep a scrape, and drop those out of the longest window."""
        self.scrapes.append((now_s, samples))
        while now_s - self.scrapes[0][0] > _SLOW_WINDOW_S:
            self.scrapes.popleft()

    @property
    def scraped_at_s(self) -> float | None:
        """When it last answered."""
        return self.scrapes[-1][0] if self.scrapes else None

    def value(self, series: Series) -> float | None:
        """Return the last value."""
        return self.scrapes[-1][1].get(series) if self.scrapes else None

    def rate(self, series: Series, window_s: float) -> float | None:
        """Return a counter's increase per second; None before its second scrape.

        A counter that fell was reset by a restart and began at zero.
        """
        newest = self.scraped_at_s
        if newest is None:
            return None
        points = [
            (at, samples[series])
            for at, samples in self.scrapes
            if series in samples and newest - at <= window_s
        ]
        if len(points) < 2:
            return None
        increase, before = 0.0, points[0][1]
        for _, value in points[1:]:
            increase += value - before if value >= before else value
            before = value
        return increase / (points[-1][0] - points[0][0])


class ScrapeSource:
    """Scrapes each process itself; who does not answer makes its figures grow old."""

    def __init__(
        self,
        gateways: Callable[[], Awaitable[Sequence[str] | None]],
        *,
        port: int = METRICS_PORT,
        timeout_s: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateways = gateways  # addresses of the gateways; None: not known now
        self._port = port
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._processes: dict[str, Process] = {}

    async def collect(self, targets: Sequence[Target]) -> Mapping[Name, Measured]:
        """Return the signals of each target."""
        gateways = await self._gateways()
        runtimes = {address for target in targets for address in target.addresses}
        wanted = {*(gateways or ()), *runtimes}
        self._forget(self._processes.keys() - wanted)
        limit = asyncio.Semaphore(_AT_ONCE)
        await asyncio.gather(*(self._scrape(address, limit) for address in wanted))
        now = self._clock()
        found: dict[Name, Measured] = {}
        for target in targets:
            raw = Raw()
            self._read(raw, Origin.GATEWAY, gateways or (), target, now)
            self._read(raw, Origin.RUNTIME, target.addresses, target, now)
            found[target.name] = measured(raw, target)
        return found

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _forget(self, addresses: Iterable[str]) -> None:
        """Drop processes that nobody has asked for in the longest window.

        Not at once: a look at one deployment must not cost the others what was seen of theirs.
        """
        oldest = self._clock() - _SLOW_WINDOW_S
        for address in addresses:
            scraped_at = self._processes[address].scraped_at_s
            if scraped_at is None or scraped_at < oldest:
                del self._processes[address]

    async def _scrape(self, address: str, limit: asyncio.Semaphore) -> None:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        process = self._processes.setdefault(address, Process())
        host = f"[{address}]" if address.count(":") > 1 else address
        netloc = host if ":" in address and address.count(":") == 1 else f"{host}:{self._port}"
        try:
            async with limit, self._session.get(f"http://{netloc}/metrics") as response:
                response.raise_for_status()
                samples = parse(await response.text())
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return
        process.take(self._clock(), samples)

    def _read(
        self, raw: Raw, origin: Origin, addresses: Iterable[str], target: Target, now: float
    ) -> None:
        """Put one kind of process into the raw figures."""
        processes = [p for a in addresses if (p := self._processes.get(a)) and p.scrapes]
        ages = [now - (process.scraped_at_s or now) for process in processes]
        if origin is Origin.GATEWAY:
            # A gateway that never answered may have counted requests nobody else saw.
            is_complete = len(processes) == len(tuple(addresses))
            raw.gateway_age_s = max(ages) if ages and is_complete else None
        else:
            raw.runtime_age_s = max(ages) if ages else None
            raw.reporting = len(processes)
        prefix = target.name if origin is Origin.GATEWAY else ()
        for figure in ALL:
            if figure.origin is origin:
                for parts, value in _combined(figure, processes, prefix).items():
                    raw.values[figure, parts] = value


def _combined(
    figure: Figure, processes: Sequence[Process], prefix: tuple[str, ...]
) -> dict[tuple[str, ...], float]:
    """Return the figure over several processes, by the values of its labels."""
    values: dict[tuple[str, ...], list[float]] = {}
    for process in processes:
        for metric, labels in process.scrapes[-1][1]:
            if metric != figure.metric or labels[: len(prefix)] != prefix:
                continue
            value = _of_process(figure, process, (metric, labels))
            if value is not None:
                values.setdefault(labels[len(prefix) :], []).append(value)
    is_mean = figure.kind is Kind.MEAN
    return {
        parts: sum(several) / (len(several) if is_mean else 1) for parts, several in values.items()
    }


def _of_process(figure: Figure, process: Process, series: Series) -> float | None:
    match figure.kind:
        case Kind.RATE:
            return process.rate(series, _FAST_WINDOW_S)
        case Kind.SLOW_RATE:
            return process.rate(series, _SLOW_WINDOW_S)
        case _:
            return process.value(series)
