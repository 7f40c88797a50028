"""A deployment's past: what its pods and ControllerRevisions tell, and what of it to keep. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mizzen.operator.controllers.llmdeployment_observe import Observed
from mizzen.operator.controllers.llmdeployment_replicas import Group
from mizzen.operator.crds.common import Json
from mizzen.operator.desired.revisions import (
    KIND,
    Recorded,
    build_revision,
    read_note,
    read_revision,
)
from mizzen.operator.desired.serving import made_from
from mizzen.operator.planning.history import Entry, next_history


def written_revisions(observed: Observed) -> dict[str, Recorded]:
    """Return the ControllerRevisions there are, by revision."""
    documents = (child for child in observed.children if child["kind"] == KIND)
    return {one.revision: one for one in map(read_revision, documents) if one is not None}


def known_revisions(observed: Observed) -> dict[str, Recorded]:
    """Return every revision whose pods could be made again."""
    return _noted(observed.groups) | written_revisions(observed)


def build_history(observed: Observed, *, in_use: Iterable[str] = ()) -> tuple[Json, ...]:
    """Return the ControllerRevisions that should exist; those `in_use` stay in any case."""
    written, noted = written_revisions(observed), _noted(observed.groups)
    entries = next_history(
        [Entry(one.revision, one.number) for one in written.values()],
        current=observed.revision,
        known=tuple(noted),
        in_use={group.replica.revision for group in observed.groups}.union(in_use),
        rests=observed.desired == 0 and observed.revision in noted,
        limit=observed.spec.rollout.revision_history_limit,
    )
    own = Recorded(observed.revision, made_from(observed.serving))
    found: Mapping[str, Recorded] = {own.revision: own} | noted | written
    return tuple(
        build_revision(
            observed.serving, Recorded(e.revision, found[e.revision].made_from, e.number)
        )
        for e in entries
    )


def _noted(groups: Iterable[Group]) -> dict[str, Recorded]:
    """Return what the pods were made from, that of the oldest pod first."""
    leaders = [group.leader for group in groups if group.leader is not None]
    leaders.sort(key=lambda pod: str(pod["metadata"].get("creationTimestamp") or ""))
    notes = [note for note in map(read_note, leaders) if note is not None]
    return {note.revision: note for note in notes}
