"""Metrics and log lines. Names are controller-runtime's where the meaning is the same."""

import json
import logging
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Telemetry:
    """The operator's metrics: queue, reconciles and writes report to it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._adds = Counter("workqueue_adds", "Keys that became due.", ["name"], registry=registry)
        self._waits = Histogram(
            "workqueue_queue_duration_seconds",
            "From due to taken.",
            ["name"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._works = Histogram(
            "workqueue_work_duration_seconds",
            "From taken to given back.",
            ["name"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._retries = Counter(
            "workqueue_retries", "Keys put off after a failure.", ["name"], registry=registry
        )
        self.depth = Gauge("workqueue_depth", "Keys that are due.", registry=registry)
        self.oldest = Gauge(
            "mizzen_queue_oldest_age_seconds", "Age of the oldest due key.", registry=registry
        )
        self.longest = Gauge(
            "workqueue_longest_running_processor_seconds",
            "Age of the slowest running reconcile.",
            registry=registry,
        )
        self._reconciles = Counter(
            "controller_runtime_reconcile",
            "Reconciles by their result.",
            ["controller", "result"],
            registry=registry,
        )
        self._writes = Counter(
            "mizzen_writes", "Writes by kind and outcome.", ["kind", "outcome"], registry=registry
        )
        self.leader = Gauge(
            "leader_election_master_status", "1 while this process leads.", registry=registry
        )
        self.resync_age = Gauge(
            "mizzen_resync_age_seconds", "Since the last full relist.", registry=registry
        )
        self.objects = Gauge("mizzen_store_objects", "Objects in memory.", registry=registry)
        self.loop_lag = Gauge(
            "mizzen_loop_lag_seconds", "How late the event loop ran last.", registry=registry
        )

    def added(self, kind: str) -> None:
        """A key became due."""
        self._adds.labels(kind).inc()

    def taken(self, kind: str, waited_s: float) -> None:
        """A worker took a key."""
        self._waits.labels(kind).observe(waited_s)

    def finished(self, kind: str, worked_s: float) -> None:
        """A worker gave a key back."""
        self._works.labels(kind).observe(worked_s)

    def retried(self, kind: str) -> None:
        """A key was put off after a failure."""
        self._retries.labels(kind).inc()

    def reconciled(self, kind: str, result: str) -> None:
        """A reconcile ended."""
        self._reconciles.labels(kind, result).inc()

    def wrote(self, kind: str, outcome: str) -> None:
        """A write was applied, created, skipped, deleted or failed."""
        self._writes.labels(kind, outcome).inc()

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text form."""
        return generate_latest(self.registry)


_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_ALLOWED_EXTRAS = (str, int, float, bool)


class JsonLines(logging.Formatter):
    """One JSON object per line; what was given as `extra` becomes its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {
            name: value
            for name, value in vars(record).items()
            if name not in _STANDARD and isinstance(value, _ALLOWED_EXTRAS)
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(*, form: str, level: str) -> None:
    """Send everything to standard error in the form asked for."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonLines()
        if form == "json"
        else logging.Formatter("%(asctime)s %(levelname)-7s %(name)s %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Kopf tells of every event it hands over; we only want to hear of its troubles.
    logging.getLogger("kopf").setLevel(max(logging.WARNING, root.level))
