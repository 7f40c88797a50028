"""Makes Kopf an informer: it lists, watches and hands events over, and keeps nothing.

What its own handlers would need (differences, progress, finalizers, peering) is switched off; the
two storages alone would copy every object several times per event.
"""

import random
from collections.abc import Iterator
from typing import Any

import kopf


class Backoffs:
    """Pauses between Kopf's tries of one request: iterable again and again, with jitter."""

    def __iter__(self) -> Iterator[float]:
        for step in range(8):
            yield min(20.0, 0.25 * 2**step) * random.uniform(0.8, 1.2)


class NoDifferences(kopf.DiffBaseStorage):
    """Finds no differences: who reacts to a state needs none."""

    def build(self, **_: Any) -> Any:
        """Return nothing worth comparing."""
        return {}

    def fetch(self, **_: Any) -> Any:
        """Return nothing: no state was stored."""
        return None

    def store(self, **_: Any) -> None:
        """Store nothing."""


class NoProgress(kopf.ProgressStorage):
    """Keeps no progress on the objects: the work queue retries."""

    def fetch(self, **_: Any) -> Any:
        """Return nothing: no handler is in progress."""
        return None

    def store(self, **_: Any) -> None:
        """Store nothing."""

    def purge(self, **_: Any) -> None:
        """Purge nothing."""

    def touch(self, **_: Any) -> None:
        """Touch nothing."""

    def clear(self, *, essence: Any) -> Any:
        """Return the essence as it is: nothing of ours is in it."""
        return essence


def configure_kopf(settings: kopf.OperatorSettings) -> None:
    """Switch off everything but listing and watching, and bound how long that may hang."""
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.chunk_size = 250
    settings.watching.server_timeout = 290
    settings.watching.client_timeout = 310
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = Backoffs()
    settings.execution.max_workers = 4
    settings.persistence.finalizer = "mizzen.dev/operator"
    settings.persistence.progress_storage = NoProgress()
    settings.persistence.diffbase_storage = NoDifferences()
    settings.process.ultimate_exiting_timeout = 25
