"""Which revisions of a deployment are remembered, and under which number. Pure.

A deployment that never changed has no history: only a second revision, or a size of zero, which
leaves no pod to tell what it was made from, makes one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """A revision and its number; the newest has the highest."""

    revision: str
    number: int


def next_history(
    kept: Iterable[Entry],
    *,
    current: str,
    known: Sequence[str],
    in_use: Collection[str],
    rests: bool,
    limit: int,
) -> tuple[Entry, ...]:
    """Return the entries that should exist, the oldest first.

    `known` are the revisions, the oldest first, that can still be told from pods; `in_use` must
    stay whatever `limit` says; `rests`: no replica is wanted.
    """
    before = sorted(kept, key=lambda entry: entry.number)
    unwritten = [r for r in known if r != current and r not in {e.revision for e in before}]
    if not before and not unwritten and not rests:
        return ()
    past = [entry for entry in before if entry.revision != current]
    newest = max((entry.number for entry in past), default=0)
    for revision in unwritten:
        newest += 1
        past.append(Entry(revision, newest))
    own = next((e for e in before if e.revision == current and e.number > newest), None)
    disused = [entry for entry in past if entry.revision not in in_use]
    dropped = disused[: max(0, len(disused) - limit)]
    return (
        *(entry for entry in past if entry not in dropped),
        own or Entry(current, newest + 1),
    )


def restored_spec(
    current: Mapping[str, object], past: Mapping[str, object], *, kept: Collection[str]
) -> dict[str, object]:
    """Return the current spec gone back to a past revision, but for the fields that are `kept`."""
    return {
        **{field: value for field, value in past.items() if field not in kept},
        **{field: current[field] for field in kept if field in current},
    }
